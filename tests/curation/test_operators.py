"""Each operator against worked examples."""

import random

import imagehash
import numpy as np
import pytest
from PIL import Image

from benchmarks.curation_rows import encoded, picture
from core.model.pictures import Picture
from corpus.curation.asking import VIDEO_SCALES, DistilAnswer, FreeResponse, GuidedChain, Score
from corpus.curation.base import Dropped, NoReply
from corpus.curation.difficulty import PassAtK, unlearnable
from corpus.curation.running import UniqueIds
from corpus.curation.sampling import BalanceLengths, LatentClasses, caps, hashed
from corpus.curation.similar import HASH_PX, HASH_SIDE, Decontaminate, Duplicates, picture_hashes, reduced
from corpus.curation.steps import OPERATORS
from corpus.curation.texts import Redundancy, StripInstructions, UnifyFormat, split, stripped

ROW = {
    "id": "r",
    "images": [],
    "videos": [],
    "system": None,
    "history": [],
    "question": "How many?",
    "answer": "4",
    "chain": None,
    "response": None,
    "mode": "think",
    "verifier": "number",
    "source": "made",
    "meta": {},
    "hashes": [],
}


class Said:
    """Tools with given replies."""

    def __init__(self, *replies, right=True):
        self.replies, self.asked, self._right = list(replies), [], right

    def ask(self, model, requests):
        self.asked += requests
        return [self.replies.pop(0) for _ in requests]

    def right(self, row, text):
        return self._right

    def sample(self, model, rows, samples, max_tokens, temperature):
        return [self.replies.pop(0) for _ in rows]

    def check_judge(self, score):
        pass


class Held:
    """The arrays of one batch, as a set operator reads them."""

    def __init__(self, signs, ids, own=None):
        self.signs, self._ids, self.own = signs, ids, len(ids) if own is None else own

    def column(self, name):
        return self.signs[name]

    def rows(self):
        return len(self._ids)

    def ids(self, rows):
        return {row: self._ids[row] for row in rows}

    def __iter__(self):
        return iter([self.signs])


def decided(step, rows, own=None, seed=0):
    held = Held(step.sign(rows, None), [row["id"] for row in rows], own)
    return step.decide(held, seed).drops


def one(step, tools=None, **changes):
    return step([{**ROW, **changes}], tools)[0]


def test_every_operator_names_its_source():
    assert len(OPERATORS) == 13
    for name, kind in OPERATORS.items():
        assert "Source: " in kind.__doc__, name


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("What is shown? Answer the question using a single word or phrase.", "What is shown?"),
        (
            "What is shown?\nAnswer with the option's letter from the given choices directly.",
            "What is shown?",
        ),
        (
            "Hint: Please answer the question and provide the final value at the end.\nQuestion: How tall?",
            "How tall?",
        ),
        ("You are a helpful AI assistant.\nCount the cats.", "Count the cats."),
        ("Solve it. Please put your final answer in \\boxed{}.", "Solve it."),
        ("What is 2+2? Let's think step by step.", "What is 2+2?"),
        ("Answer in the box is 4. Why?", "Answer in the box is 4. Why?"),
        ("Which letter is in the answer key?", "Which letter is in the answer key?"),
        ("Where does she think the ball is?", "Where does she think the ball is?"),
    ],
)
def test_instructions_are_stripped_and_questions_stay(given, left):
    assert stripped(given) == left


def test_a_question_of_instructions_alone_is_dropped():
    assert isinstance(one(StripInstructions(op="strip_instructions"), question="Answer briefly."), Dropped)


@pytest.mark.parametrize(
    ("reply", "chain", "answer"),
    [
        ("<think>2 and 2.</think>\\boxed{4}", "2 and 2.", "4"),
        ("<think>2 and 2.</think> The answer is 4.", "2 and 2.", "4"),
        (
            "<SUMMARY>Count.</SUMMARY><REASONING>2 + 2 = 4</REASONING><CONCLUSION>4</CONCLUSION>",
            "Count.\n2 + 2 = 4",
            "4",
        ),
        ("First 2, then 2 more, so 4 in all.\nThe answer is 4.", "First 2, then 2 more, so 4 in all.", "4"),
        ("There are 2 + 2.\nTherefore, the final answer is $\\boxed{4}$.", "There are 2 + 2.", "4"),
    ],
)
def test_formats_become_one(reply, chain, answer):
    assert split(reply) == (chain, answer)
    made = one(UnifyFormat(op="unify_format"), response=reply)
    assert (made["chain"], made["answer"], made["response"]) == (chain, answer, None)


def test_a_reply_with_another_answer_than_the_gold_is_dropped_or_wins():
    reply = "<think>2 and 3.</think>\\boxed{5}"
    assert one(UnifyFormat(op="unify_format"), response=reply).reason.startswith("the reply's answer differs")
    assert one(UnifyFormat(op="unify_format", gold="replace"), response=reply)["answer"] == "5"


@pytest.mark.parametrize(
    "reply", ["I do not know what is in this picture, but I like looking at it a lot.", "4"]
)
def test_replies_without_reasoning_or_answer_are_dropped(reply):
    assert isinstance(one(UnifyFormat(op="unify_format"), response=reply), Dropped)


def test_direct_rows_and_finished_chains_pass_the_format_step():
    assert one(UnifyFormat(op="unify_format"), mode="direct", response="A bus.")["response"] == "A bus."
    assert one(UnifyFormat(op="unify_format"), chain="2 + 2 = 4")["chain"] == "2 + 2 = 4"


@pytest.mark.parametrize(
    ("chain", "dropped"),
    [
        ("The answer is 4.", True),
        ("4", True),
        ("How many? 4.", True),
        ("A=1;B=3;1+3=4", False),
        ("Two birds sit left and two sit right.", False),
    ],
)
def test_restating_chains_are_dropped(chain, dropped):
    assert isinstance(one(Redundancy(op="redundancy"), chain=chain), Dropped) == dropped


def hashes_of(*files):
    return picture_hashes([reduced(Picture(data).grey(HASH_PX)) for data in files])


def test_duplicates_keep_the_first_and_name_it():
    image = picture(random.Random(1))
    *hashes, other = hashes_of(encoded(image), encoded(image, quality=30), encoded(picture(random.Random(2))))
    rows = [
        {**ROW, "id": "first", "hashes": [hashes[0]], "question": "How many birds sit on the roof?"},
        {**ROW, "id": "other picture", "hashes": [other], "question": "How many birds sit on the roof?"},
        {**ROW, "id": "near", "hashes": [hashes[1]], "question": "how many birds sit on the roof"},
        {**ROW, "id": "equal", "hashes": [hashes[0]], "question": "How many birds sit on the roof?"},
        {**ROW, "id": "other question", "hashes": [hashes[0]], "question": "Which colour has the door?"},
    ]
    near, equal = Dropped("near duplicate", "of first"), Dropped("duplicate", "of first")
    assert decided(Duplicates(op="duplicates"), rows) == [None, None, near, equal, None]


def test_questions_that_differ_in_a_number_are_different():
    rows = [
        {**ROW, "id": str(n), "question": f"A train goes 12{n} km in 2 hours. How fast is it?"}
        for n in range(3)
    ]
    assert decided(Duplicates(op="duplicates"), rows) == [None, None, None]


def test_leaks_are_dropped_and_the_held_out_row_is_named():
    question = "What is the height of the tower?"
    rows = [{**ROW, "id": "mine"}, {**ROW, "id": "leak", "question": question}]
    rows += [{**ROW, "id": "held-1", "question": f"{question} "}]
    drops = decided(Decontaminate(op="decontaminate"), rows, own=2)
    assert drops == [None, Dropped("equal to a held-out row", "held-1")]


def test_repeated_ids_are_dropped():
    assert decided(UniqueIds(), [ROW, ROW, {**ROW, "id": "s"}]) == [None, Dropped("id: must be unique"), None]


def test_classes_are_filled_evenly():
    assert caps([100, 10, 50], 60) == [25, 10, 25]
    assert caps([3, 3], 10) == [3, 3]
    assert sum(caps([7, 1, 9, 4], 11)) == 11


def test_lengths_are_balanced():
    rows = [{**ROW, "id": str(n), "chain": "a " * (3 if n < 80 else 30)} for n in range(100)]
    drops = decided(BalanceLengths(op="balance_lengths", keep_share=0.4), rows)
    kept = [n for n, drop in enumerate(drops) if drop is None]
    assert (sum(n < 80 for n in kept), sum(n >= 80 for n in kept)) == (20, 20)
    assert decided(BalanceLengths(op="balance_lengths", keep_share=0.4), rows) == drops


def test_latent_classes_are_sampled_uniformly():
    phrases = ["reading a bar chart"] * 90 + ["naming a dog breed"] * 30
    rows = [{**ROW, "id": str(n), "meta": {"phrase": phrase}} for n, phrase in enumerate(phrases)]
    drops = decided(LatentClasses(op="latent_classes", keep_share=0.5, classes=2), rows)
    kept = [n for n, drop in enumerate(drops) if drop is None]
    assert (sum(n < 90 for n in kept), sum(n >= 90 for n in kept)) == (30, 30)


def test_hashed_embeddings_have_unit_length_and_tell_texts_apart():
    found = hashed(["reading a bar chart", "Reading a bar chart", "naming a dog breed"])
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert found[0] @ found[1] > 0.99 > 0.5 > found[0] @ found[2]


LONG = "The number of apples in the basket is clearly 4 apples"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("4", "4"),
        ("4 apples.", "4 apples"),
        ("5", LONG),
        ("four", LONG),
        (LONG + " and more", LONG),
        (NoReply("x"), LONG),
    ],
)
def test_wordy_answers_are_shortened_by_their_own_words(reply, answer):
    made = one(DistilAnswer(op="distil_answer", model="m"), Said(reply), answer=LONG, verifier="judge")
    assert made["answer"] == answer
    assert made["verifier"] == {"4": "number", "4 apples": "exact"}.get(answer, "judge")


def test_short_answers_are_not_sent():
    tools = Said()
    assert one(DistilAnswer(op="distil_answer", model="m"), tools)["answer"] == "4"
    assert tools.asked == []


CHOICE = {"question": "What is 3 + 4?\nA. 6\nB. 7", "answer": "B", "verifier": "choice"}


def test_numeric_choices_become_free_response():
    made = one(FreeResponse(op="free_response", model="m"), Said("What is 3 + 4?"), **CHOICE)
    assert (made["question"], made["answer"], made["verifier"]) == ("What is 3 + 4?", "7", "number")


@pytest.mark.parametrize(
    "reply", ["Which of the following is 3 + 4?", "What is 3 + 5?", "What is 3 + 4?\nA. 6\nB. 7"]
)
def test_a_bad_rewriting_drops_the_row(reply):
    assert isinstance(one(FreeResponse(op="free_response", model="m"), Said(reply), **CHOICE), Dropped)


def test_choices_of_words_stay():
    words = {**CHOICE, "question": "Which animal?\nA. cat\nB. dog"}
    assert one(FreeResponse(op="free_response", model="m"), Said(), **words)["question"] == words["question"]


@pytest.mark.parametrize(
    ("reply", "right", "reason"),
    [
        ("Two left, two right, 2 + 2 = 4. \\boxed{4}", True, None),
        ("Two left, two right.", True, "without a boxed"),
        ("The given answer is 4, so I count two and two. \\boxed{4}", True, "was given"),
        ("Two left, three right. \\boxed{5}", False, "another answer"),
        ("It is 4. \\boxed{4}", True, "restates"),
    ],
)
def test_guided_chains_are_checked(reply, right, reason):
    made = one(GuidedChain(op="guided_chain", model="m"), Said(reply, right=right))
    if reason is None:
        assert made["chain"] == "Two left, two right, 2 + 2 = 4."
    else:
        assert reason in made.reason


def test_video_scores_have_the_reports_ranges_and_thresholds():
    found = {name: (scale.lowest, scale.highest, scale.least) for name, scale in VIDEO_SCALES.items()}
    assert found == {"alignment": (-1, 10, 5), "richness": (-1, 7, 5), "difficulty": (-1, 8, 3)}
    score = Score(op="score", model="m", preset="video")
    assert one(score, Said("5", "5", "3"))["meta"]["scores"] == {
        "alignment": 5,
        "richness": 5,
        "difficulty": 3,
    }
    assert one(score, Said("5", "4", "3")).reason == "richness below 5"
    assert one(score, Said("5", "5", "-1")).reason == "difficulty below 3"
    assert one(score, Said("5", NoReply("cut off"), "3")).reason == "no usable reply"


@pytest.mark.parametrize(
    ("rate", "mode", "reason"),
    [
        (1, "think", "always solved"),
        (0, "think", "never solved"),
        (0, "direct", None),
        (1, "direct", "always solved"),
    ],
)
def test_difficulty_classes(rate, mode, reason):
    assert unlearnable(rate, mode) == reason


def test_pass_at_k_keeps_the_rate_and_drops_ungradable_rows():
    step = PassAtK(op="pass_at_k", model="m")
    assert one(step, Said([1.0, 0.0, None, 0.0]))["meta"]["pass_rate"] == pytest.approx(1 / 3)
    assert one(step, Said([None] * 4)).reason == "the gold answer cannot be graded"


def test_the_hash_survives_scaling_and_sees_other_pictures():
    image = picture(random.Random(5))
    files = encoded(image, "PNG"), encoded(image.resize((60, 60)), quality=70)
    hashes = hashes_of(*files, encoded(picture(random.Random(6)), "PNG"))
    first, small, other = (np.frombuffer(one, np.uint8) for one in hashes)
    assert np.bitwise_count(first ^ small).sum() <= 24 < np.bitwise_count(first ^ other).sum()


def test_hashes_of_a_batch_are_those_of_imagehash():
    flat = [Image.new("L", (40, 40), level) for level in (0, 7, 255)]
    images = [*flat, Image.linear_gradient("L"), Image.new("L", (1, 1), 9), Image.new("L", (300, 2), 200)]
    images += [picture(random.Random(n), 40 + n).convert("L") for n in range(60)]
    theirs = [np.packbits(imagehash.phash(one, HASH_SIDE, 2).hash).tobytes() for one in images]
    assert picture_hashes([reduced(one) for one in images]) == theirs


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_pictures_follow_the_rule_of_pictures(kind):
    image = picture(random.Random(7), 128)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Picture(encoded(image, kind, exif=exif))
    grey = turned.grey(32)
    plain = turned.rgb().convert("L").resize(grey.size)
    assert np.abs(np.asarray(grey, float) - np.asarray(plain, float)).mean() < 6

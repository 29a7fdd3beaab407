import pytest

from core.model.prompts import THINK_CONTRACT, messages, target_text, user_text

ROW = {
    "id": "a",
    "question": "What is B?",
    "answer": "7",
    "mode": "think",
    "chain": "B = 7 .",
    "response": None,
}


def test_the_contract_is_the_model_cards():
    assert THINK_CONTRACT == (
        r"You FIRST think about the reasoning process as an internal monologue and then provide the final "
        r"answer. The reasoning process MUST BE enclosed within <think> </think> tags. "
        r"The final answer MUST BE put in \boxed{}."
    )


def test_thinking_mode_adds_the_contract_on_a_line_of_its_own():
    assert user_text("What is B?", "think") == f"What is B?\n{THINK_CONTRACT}"


def test_direct_mode_leaves_the_question_alone():
    assert user_text("What is B?", "direct") == "What is B?"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"'thinking'.*think.*direct"):
        user_text("What is B?", "thinking")


def test_a_thinking_target_is_chain_and_boxed_answer():
    assert target_text(ROW) == r"<think>B = 7 .</think>\boxed{7}"


def test_a_direct_target_is_the_answer_alone():
    assert target_text({**ROW, "mode": "direct"}) == "7"


@pytest.mark.parametrize("mode", ["think", "direct"])
def test_a_response_is_the_target_verbatim(mode):
    assert target_text({**ROW, "mode": mode, "response": "Seven."}) == "Seven."


def test_a_thinking_row_without_chain_is_refused():
    with pytest.raises(ValueError, match=r"row 'a'.*chain"):
        target_text({**ROW, "chain": None})


def test_images_come_before_the_question():
    (user,) = messages({**ROW, "images": ["first", "second"]})
    assert [part["type"] for part in user["content"]] == ["image", "image", "text"]
    assert [part["image"] for part in user["content"][:2]] == ["first", "second"]


def test_the_target_is_an_assistant_turn():
    user, assistant = messages({**ROW, "images": []}, with_target=True)
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    assert assistant["content"] == [{"type": "text", "text": target_text(ROW)}]


def test_the_question_is_tokenized_alike_in_both_modes():
    from core.model.tokenizer import build_word_tokenizer

    tokenizer = build_word_tokenizer(["What", "is", "B"])
    direct = tokenizer.encode(user_text("What is B?", "direct"), add_special_tokens=False)
    think = tokenizer.encode(user_text("What is B?", "think"), add_special_tokens=False)
    assert think[: len(direct)] == direct
    assert tokenizer.decode(think[len(direct) :]).strip() == THINK_CONTRACT


def test_the_chat_template_adds_the_contract_where_a_request_asks_for_thinking(tmp_path):
    from core.model.tokenizer import build_word_tokenizer

    tokenizer = build_word_tokenizer(["how"])

    def rendered(*turns, **options):
        chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)

    asked = ("user", "how?"), ("assistant", "3"), ("user", "how?")
    by_client = (*asked[:2], ("user", user_text("how?", "think")))
    assert rendered(*asked, enable_thinking=True) == rendered(*by_client)
    assert rendered(*by_client, enable_thinking=True) == rendered(*by_client)  # not twice
    assert rendered(*asked, enable_thinking=False) == rendered(*asked)
    assert THINK_CONTRACT not in rendered(*asked)

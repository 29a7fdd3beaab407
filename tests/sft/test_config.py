import pytest

from core.strict import ConfigError, parse
from sft.config import SFTConfig, SoupConfig

OPTIM = {"learning_rate": 1e-3, "epochs": 1, "global_batch_size": 8}
PHASE = {"name": "one", "data": [{"set": "panels"}], "optim": OPTIM}
STAGE = {"phases": [PHASE], "max_tokens": 64}


def phase(**optim):
    return {**PHASE, "optim": {**OPTIM, **optim}}


def test_a_stage_with_one_phase_parses():
    assert parse(SFTConfig, STAGE).phases[0].optim.gradient_accumulation(ranks=1) == 8


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"phases": []}, "phases"),
        ({"phases": [phase(epochs=None)]}, r"phases\[0\].*needs epochs or max_steps"),
        ({"phases": [phase(max_steps=3)]}, r"phases\[0\].optim.*give one"),
        ({"phases": [phase(global_batch_size=None)]}, "global_batch_size is missing"),
        (
            {"phases": [phase(micro_batch_size=3)], "packing": "off"},
            "global_batch_size=8 is not a multiple.*6 and 9",
        ),
        ({"phases": [phase(global_batch_size=None)], "packing": "off"}, "global_batch_size is missing"),
        ({"packing": {"update_tokens": 64}}, "by rows or by tokens"),
        ({"packing": {"micro_batch_tokens": 63}}, "is less than max_tokens=64.*raise it"),
        (
            {"phases": [phase(global_batch_size=None)], "packing": {"update_tokens": 100}},
            "multiples: 64 and 128",
        ),
        (
            {"packing": {"micro_batch_tokens": 3}},
            r"packing.micro_batch_tokens = 3: .*greater than or equal to 8",
        ),
        ({"packing": "on"}, "packing = 'on'"),
        ({"packing": {"tokens": 64}}, "did you mean update_tokens"),
        ({"phases": [PHASE, PHASE]}, "names must differ.*'one', 'one'"),
        ({"phases": [{**PHASE, "data": []}]}, r"phases\[0\].data"),
        ({"phases": [{**PHASE, "freeze": ["tower", "adapter", "language_model"]}]}, "nothing would train"),
        ({"phases": [{**PHASE, "freeze": ["tower"]}], "learner": {"lora": {}}}, "LoRA freezes"),
        ({"phases": [phase(learning_rat=1)]}, "did you mean learning_rate"),
        ({"overlong": "cut"}, "overlong"),
        ({"overlong": "periodic", "packing": "off"}, "overlong: periodic needs packing"),
        ({"overlong": "periodic", "periodic": {"max_tokens": 64}}, "periodic.max_tokens=64 is not more than"),
        (
            {"phases": [{**PHASE, "max_tokens": 80}], "packing": {"micro_batch_tokens": 64}},
            "packing.micro_batch_tokens=64 is less than max_tokens=80",
        ),
        ({"max_token": 64}, "did you mean max_tokens"),
    ],
)
def test_a_stage_that_cannot_run_is_refused(stage, message):
    with pytest.raises(ConfigError, match=message):
        parse(SFTConfig, {**STAGE, **stage})


def test_a_phase_may_thaw_what_the_learner_freezes():
    stage = {**STAGE, "phases": [{**PHASE, "freeze": []}], "learner": {"freeze": ["tower"]}}
    assert parse(SFTConfig, stage).phases[0].freeze == ()


def test_two_equal_variants_are_refused():
    variants = [{"seed_offset": 1}, {"seed_offset": 1}]
    with pytest.raises(ConfigError, match="two are the same fine-tuning"):
        parse(SoupConfig, {"variants": variants, "validation": {"set": "panels"}})


def test_packing_is_on_unless_it_is_off():
    assert (
        parse(SFTConfig, STAGE).micro_batch_tokens(parse(SFTConfig, STAGE).phases[0]) == 64
    )  # 1 x max_tokens
    assert parse(SFTConfig, {**STAGE, "packing": "off"}).packing is None


def test_a_phase_may_have_its_own_row_length_and_over_long_rows():
    phases = [{**PHASE, "name": "short"}, {**PHASE, "max_tokens": 128}]
    cfg = parse(SFTConfig, {**STAGE, "phases": phases, "overlong": "periodic"})
    assert [cfg.row_tokens(phase) for phase in cfg.phases] == [64, 128]
    assert [cfg.longest_row(phase) for phase in cfg.phases] == [128, 256]
    assert [cfg.micro_batch_tokens(phase) for phase in cfg.phases] == [64, 128]  # micro_batch_size 1
    assert [cfg.pass_tokens(phase) for phase in cfg.phases] == [128, 256]
    capped = parse(
        SFTConfig, {**STAGE, "phases": phases, "overlong": "periodic", "periodic": {"max_tokens": 100}}
    )
    assert [capped.longest_row(phase) for phase in capped.phases] == [100, 128]

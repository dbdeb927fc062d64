"""Which key an unknown name is taken to mean."""

import pytest

from fastvit_engine.config.keys import _ALIASES, _MEANT, MOVED, fields, hint, takes_null, takes_text


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("betas", "optimizer.betas"),
        ("batch_size", "train.global_batch_size"),
        ("train.batch-size", "train.global_batch_size"),
        ("epochs", "train.duration"),
        ("warmup_steps", "schedule.warmup"),
        ("optimizer.warmup", "schedule.warmup"),
        ("num_classes", "model.num_classes"),
        ("data.num_classes", "model.num_classes"),
        ("img_size", "model.image_size"),
        ("model.img_size", "model.image_size"),
        ("amp", "train.precision"),
        ("mixup", "augment.mixup"),
        ("train.mixup", "augment.mixup"),
        ("data.mixup", "augment.mixup"),
        ("optimiser", "optimizer"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("data.trian", "data.train"),
        ("data.train.weigth", "data.train.weight"),
        ("lerning_rate", "optimizer.learning_rate"),
        ("train.lerning_rate", "optimizer.learning_rate"),
    ],
)
def test_the_key_that_is_meant(unknown, meant):
    assert hint(unknown) == f"did you mean '{meant}'?"


def test_a_name_that_several_sections_have_is_offered_with_all_of_them():
    assert hint("every") == "did you mean 'evaluate.every', 'evaluate.fewshot.every' or 'checkpoint.every'?"
    assert hint("evaluate.fewshot.shot") == "did you mean 'evaluate.fewshot.shots'?"


def test_an_option_of_the_command_line():
    assert hint("output_dir") == "use the option --out of the command"
    assert hint("train.resume") == "use the option --resume auto of the command"


def test_without_anything_near_all_names_are_told():
    assert hint("ema.qqqqq") == "valid: decay"
    assert hint("qqqqq").startswith("valid: name, seed, model, init, data, augment, train, tokens, optimizer")


def test_every_word_from_elsewhere_leads_to_a_key_that_exists():
    assert set(_ALIASES) <= set(fields()) and set(MOVED.values()) <= set(fields())
    words = [word for words in _ALIASES.values() for word in words.split()]
    assert len(words) == len(set(words)) and set(words) <= set(_MEANT)


def test_what_a_key_takes():
    assert takes_text("data.train") and takes_text("train.duration") and takes_text("train.precision")
    assert not takes_text("zero.stage") and not takes_text("model.width") and not takes_text("deepspeed")
    assert takes_null("data.eval") and takes_null("evaluate.every") and takes_null("model.width")
    assert not takes_null("name") and not takes_null("train.duration")

import glob
from fnmatch import fnmatchcase

import pytest
from braceexpand import braceexpand
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.data.shards.splits import Splits, choose_files, pattern_of, split_of
from fastvit_engine.errors import UserError
from tests.in_full import IN_FULL

WORDS = {
    "train": ["train", "training", "Train", "TRAIN"],
    "val": ["val", "valid", "validation", "eval", "evaluation", "dev", "Val", "VALIDATION"],
    "test": ["test", "testing", "Test"],
}
ENDINGS = [".tar", ".tar.gz", ".tgz", ".parquet"]

words = st.sampled_from([(part, word) for part, group in WORDS.items() for word in group])
datasets = st.sampled_from(["", "imagenet1k-", "imagenet-22k-wds_", "my.birds.", "cc3m-", "ILSVRC2012_img_", "2024_"])
numbers = st.sampled_from(["", "-0", "-000000", "_17", ".03", "2017", "-00000-of-00010", "-0-of-3-a1b2c3", "-256px-01"])


@settings(deadline=None, max_examples=300 if IN_FULL else 60)
@given(datasets, words, numbers, st.sampled_from(ENDINGS))
def test_a_file_belongs_to_the_split_that_it_names(dataset, named, number, ending):
    part, word = named
    assert split_of(f"{dataset}{word}{number}{ending}") == part
    assert split_of(f"s3://bucket/test/train/{dataset}{word}{number}{ending}") == part  # by its own name alone


@settings(deadline=None, max_examples=300 if IN_FULL else 60)
@given(words, st.sampled_from(["", "2017", "_images", "-set", "Set", " data", "_01", ".X1", "A"]))
def test_a_folder_belongs_to_a_split_if_it_names_nothing_else(named, rest):
    part, word = named
    separated = rest if not (rest[:1].isupper() and word.isupper()) else f"_{rest}"
    assert split_of(f"{word}{separated}", folder=True) == part


@settings(deadline=None, max_examples=300 if IN_FULL else 60)
@given(
    words,
    st.sampled_from(["shoes", "tube", "station", "board", "cat", "Wheel"]),
    st.sampled_from([" ", "_", "-"]),
    st.booleans(),
)
def test_a_class_whose_name_has_such_a_word_is_no_split(named, noun, separator, first):
    name = f"{named[1]}{separator}{noun}" if first else f"{noun}{separator}{named[1]}"
    assert split_of(name, folder=True) is None


@pytest.mark.parametrize(
    "name",
    [
        "trainer",
        "valley",
        "latest-0.tar",
        "trainval.tar",
        "evaluate",
        "device-0.tar",
        "contest.parquet",
        "",
        "0",
        "n01440764",
    ],
)
def test_names_of_no_split(name):
    assert split_of(name) is None and split_of(name, folder=True) is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k-validation-00.tar", "val"),
        ("train-00000-of-00010.parquet", "train"),
        ("data/validation-00000-of-00001-abc.parquet", "val"),
        ("ILSVRC2012_img_val.tar", "val"),
        ("trainset.tar", "train"),
        ("val/", "val"),
    ],
)
def test_names_as_they_are_published(name, part):
    assert split_of(name) == part


def test_a_name_of_two_splits_belongs_to_none():
    assert split_of("train-test-0.tar") is None
    assert Splits.of(["train-test-0.tar"]).mixed


names = st.lists(
    st.builds(
        lambda dataset, word, number: f"{dataset}{word}{number}.tar",
        datasets,
        st.sampled_from(["train", "val", "test", "part", "x"]),
        st.sampled_from(["-0", "-1", "_10", "-[2]", "-*"]),
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


@settings(deadline=None, max_examples=300 if IN_FULL else 60)
@given(names)
def test_every_name_is_in_one_group_and_each_pattern_matches_its_group_alone(names):
    splits = Splits.of(names)
    groups = [group for group in (splits.train, splits.val, splits.test, splits.unnamed) if group]
    assert sorted(name for group in groups for name in group) == sorted(names)
    for group in groups:
        parts = list(braceexpand(pattern_of(group, names)))
        assert [name for name in names if any(fnmatchcase(name, part) for part in parts)] == group


@settings(deadline=None, max_examples=300 if IN_FULL else 60)
@given(names)
def test_no_file_serves_training_and_evaluation_if_any_name_says_a_split(names):
    try:
        train, held_out = (choose_files(names, purpose, "DIR", f"data.{purpose}") for purpose in ("train", "eval"))
    except UserError:
        return
    if any(split_of(name) for name in names):
        assert not set(train.names) & set(held_out.names)
        assert {split_of(name) for name in train.names} == {"train"}
    else:
        assert train.names == held_out.names == names and train.note == ""


def test_the_note_says_what_was_chosen_and_left_out():
    names = ["a-test-0.tar", "a-train-0.tar", "a-train-1.tar", "a-val-0.tar"]
    train = choose_files(names, "train", "DIR", "data.train")
    assert train.names == names[1:3]
    assert train.note == "data.train: the 2 of DIR that are named train (left out: 1 named val and 1 named test)"
    assert choose_files(names, "eval", "DIR", "data.eval").names == ["a-val-0.tar"]
    assert choose_files(names[:3], "eval", "DIR", "data.eval").names == ["a-test-0.tar"]


def test_files_of_several_kinds_are_refused_with_the_patterns_to_give():
    names = ["extra-0.tar", "extra-1.tar", "train-0.tar", "train-1.tar", "val-0.tar"]
    with pytest.raises(UserError) as error:
        choose_files(names, "train", "s3://b/x", "data.train")
    assert str(error.value) == (
        "s3://b/x holds shards of several kinds: set data.train to the pattern that you mean, in s3://b/x/: "
        "'train-*.tar' (named train), 'val-0.tar' (named val), 'extra-*.tar' (others)"
    )


def test_files_of_the_other_split_alone_are_refused():
    with pytest.raises(
        UserError, match=r"none that is named train: .* set data\.train to 'DIR/val-\*\.tar' if you mean"
    ):
        choose_files(["val-0.tar", "val-1.tar"], "train", "DIR/", "data.train")
    with pytest.raises(UserError, match="none that is named val"):
        choose_files(["train-0.tar"], "eval", "DIR", "data.eval")


def test_a_pattern_keeps_odd_characters():
    assert pattern_of(["train-[1].tar"], []) == glob.escape("train-[1].tar")

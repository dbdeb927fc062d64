"""What is shown and recorded holds no secret of a URL, and nothing that a terminal obeys."""

import pickle
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit_engine.errors import RestartError, UserError
from fastvit_engine.shown import escaped, public_url, recorded, shown, shown_lines, without_secrets
from fastvit_engine.storage.errors import StaleIndex

PUBLIC = [
    "https://host/a/b-{000..099}.tar",
    "https://host:8080/x.tar",
    "https://host:80{80..82}/x.tar",
    "http://[::1]:80/x.tar",
    "https://host/@scope/a@b.tar",
    "s3://bucket/a@b/c#1-{0..9}.tar",
    "s3://bucket/train-?.tar",
    "abfs://container@account.dfs.core.windows.net/x.tar",
    "file:///data/a?b=c#d.tar",
    "zip://x.tar::https://host/y.zip",
    "/data/train-?.tar",
    "data/{train,eval}/*.tar",
    "a@b:c?d=e#f",
]
SECRET = st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=12).map(
    lambda text: "S3cr3t" + text
)


@pytest.mark.parametrize("url", PUBLIC)
def test_what_has_no_secret_stays(url):
    assert public_url(url) == without_secrets(url) == shown(url) == recorded(url) == url


@pytest.mark.parametrize(
    ("url", "public"),
    [
        ("https://user:pass@host/x.tar", "https://host/x.tar"),
        ("https://token@host/x.tar", "https://host/x.tar"),
        ("https://user:p@ss@host:99/x.tar", "https://host:99/x.tar"),
        ("https://user:p/a?s#s@host/x.tar", "https://host/x.tar"),
        ("https://user:pa ss@host/x.tar", "https://host/x.tar"),
        ("https://[u:p@host/x.tar", "https://host/x.tar"),
        ("HTTPS://host/x-{0..9}.tar?sig={a,b}", "HTTPS://host/x-{0..9}.tar"),
        ("https://host/x.tar?X-Amz-Signature=abc&token=d#e", "https://host/x.tar"),
        ("https://host/x.tar#token", "https://host/x.tar"),
        ("https://host/x?to=https://other/y&token=a", "https://host/x"),
        ("s3://key:secret@bucket/x-?.tar?X-Amz-Signature=abc", "s3://bucket/x-?.tar"),
        ("zip://a.tar::https://u:p@host/y.zip?sig=a", "zip://a.tar::https://host/y.zip"),
        ("{https://u:p@h/a.tar,s3://k:s@b/c.tar}", "{https://h/a.tar,s3://b/c.tar}"),
        ("abfs://user:pass@account/x.tar", "abfs://account/x.tar"),
    ],
)
def test_secrets_of_a_url_go(url, public):
    assert public_url(url) == recorded(url) == public
    assert without_secrets(f"shard '{url}', which") == f"shard '{public}', which"
    assert without_secrets(f"data.train={url}") == f"data.train={public}"


@pytest.mark.parametrize(
    ("command", "public"),
    [
        ("curl -s https://u:p@h/x.tar?sig=a | gunzip", "curl -s https://h/x.tar | gunzip"),
        ("curl -H 'Authorization: Bearer a b' h/x", "curl -H ... h/x"),
        ("curl -u me:word h/x | sort -u list", "curl -u ... h/x | sort -u list"),
        ("AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/x -", "AWS_SECRET_ACCESS_KEY=... aws s3 cp s3://b/x -"),
        ("wget --http-password=abc -O - h/x", "wget --http-password=... -O - h/x"),
    ],
)
def test_options_of_a_pipe_that_are_secret_go(command, public):
    assert public_url(f"pipe:{command}") == f"pipe:{public}"


def test_parameters_of_a_signature_go_from_a_path_too():
    assert without_secrets("GET /x.tar?a=1&X-Amz-Signature=abc: no") == "GET /x.tar?a=1&X-Amz-Signature=... no"


@settings(deadline=None)
@given(SECRET, st.sampled_from(["http", "https", "s3", "gs", "ftp"]), st.sampled_from(range(4)))
def test_a_random_secret_appears_nowhere(secret, scheme, where):
    """As a URL must hold it, percent-encoded; and, between the colon and the "@", as it is."""
    coded = quote(secret, safe="")
    url = [
        f"{scheme}://{coded}@host/x.tar",
        f"{scheme}://user:{coded}@host/x.tar",
        f"{scheme}://user:{secret}@host/x.tar",
        f"{scheme}://host/x.tar?sig={coded}",
    ][where]
    text = f'shard {url} is {url!r}: see ({url}), "{url}".'
    for result in (public_url(url), without_secrets(text), str(UserError(text)), str(recorded({url: [url, text]}))):
        assert secret not in result and coded not in result and "S3cr3t" not in result
        assert f"{scheme}://host/x.tar" in result
    assert without_secrets(without_secrets(text)) == without_secrets(text)


@given(st.text())
def test_nothing_that_is_shown_moves_the_cursor_or_turns_the_text_around(text):
    line = escaped(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029\u202e\u2066\ufeff" for c in line)
    assert escaped(line) == line
    line.encode()  # no lone surrogates, which no terminal takes


def test_text_of_every_language_stays():
    text = "Straße 猫 кошка नमस्ते می‌روم 👩‍👩‍👧 a\\b"
    assert shown(text) == text


def test_control_characters_are_shown_as_what_they_are():
    assert shown("a\x1b]0;title\x07\nb\x9b2J\u202etxt\udcff") == r"a\x1b]0;title\x07\nb\x9b2J\u202etxt\udcff"
    assert shown_lines("a\tb\r\nc\x1b[2J") == "a\tb\\r\nc\\x1b[2J"


def test_errors_are_one_line_without_secrets_also_in_another_process():
    for kind in (UserError, RestartError):
        error = kind("shard https://u:p@h/x.tar?sig=a holds \x1b[2J\n")
        assert str(error) == str(pickle.loads(pickle.dumps(error))) == r"shard https://h/x.tar holds \x1b[2J\n"
    stale = StaleIndex("https://u:p@h/x.tar?sig=a", "is shorter")
    assert str(stale) == str(pickle.loads(pickle.dumps(stale)))
    assert str(stale) == "shard https://h/x.tar is shorter: run the same command again"
    assert str(pickle.loads(pickle.dumps(stale.advising("restore it")))).endswith("is shorter: restore it")

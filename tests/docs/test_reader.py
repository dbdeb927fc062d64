"""A page that is wrong is found: its commands, its Python, and what it shows of the output."""

import pytest

PAGE = """
# Page

```bash
for name in config "no such"; do
    fastvit "$name" list  # a comment
done
```

## Second

```text
not/ run/
```

```bash
fastvit config explain data.window
```

```
  data.window: integer, > 0; default 2048
```

```bash
fastvit config show photos --set no.such=1
```

```
fastvit: error: ...
```

```python
found = 3
print("images:", found)
```

```
images: 1,000
```

### Third
"""


@pytest.fixture
def follow(reader):
    def run(*changes: tuple[str, str], section: str | None = "## Second"):
        page = PAGE
        for before, after in changes:
            assert before in page
            page = page.replace(before, after)
        (reader.folder / "page.md").write_text(page)
        reader.follow(reader.folder / "page.md", section=section)
        return reader

    return run


def test_a_section_is_followed_by_bash_and_python(follow):
    reader = follow()
    assert reader.ran == [["config", "explain", "data.window"], ["config", "show", "photos", "--set", "no.such=1"]]
    assert reader.scope["found"] == 3 and reader.spoken == "images: 3\n"


def test_bash_says_what_the_commands_are(follow):
    with pytest.raises(SystemExit):
        follow(section=None)  # there is no command "no such"
    assert follow(('"no such"', "config"), section=None).ran[-4:-2] == [["config", "list"]] * 2


@pytest.mark.parametrize(
    "change",
    [
        ("explain data.window", "explain data.no_such_key"),
        ("data.window: integer", "data.window: text"),
        ("images: 1,000", "pictures: 1,000"),
        ("images: 1,000", "images: 3\nimages: 3"),
        ("--set no.such=1", ""),  # is not refused
        ("found = 3", "assert False"),
    ],
    ids=str,
)
def test_what_is_not_as_the_page_says_is_found(follow, change):
    with pytest.raises(AssertionError):
        follow(change)


def test_what_is_replaced_must_be_on_the_page(follow, reader):
    reader.instead = {"found = 3": "found = 4"}
    assert follow().spoken == "images: 4\n"
    with pytest.raises(AssertionError, match="no longer has"):
        follow(("found = 3", "found = 5"))


def test_a_heading_that_is_gone_is_an_error(follow):
    with pytest.raises(AssertionError, match="has no heading ## Fourth"):
        follow(section="## Fourth")

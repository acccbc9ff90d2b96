"""Files that are whole or not there, and their digests."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from stepdistill.core.files import BLOCK, file_digest, write_text, written_whole
from stepdistill.core.units import changed_facts, write_facts


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_is_whole_or_not_there(tmp_path, kind):
    path = tmp_path / "deep" / "it"

    def write(part, text):
        if kind == "folder":
            part.mkdir()
        (part if kind == "file" else part / "content").write_text(text)

    def content():
        return (path if kind == "file" else path / "content").read_text()

    with pytest.raises(KeyboardInterrupt), written_whole(path) as part:
        write(part, "half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    write(path.with_name("it.stepdistill.part"), "left by a process that was killed")
    for text in ("one", "two"):
        with written_whole(path) as part:
            write(part, text)
            assert text == "one" or content() == "one"
        assert content() == text
    with pytest.raises(OSError, match="full"), written_whole(path) as part:
        write(part, "half")
        raise OSError("full")
    assert content() == "two" and list(path.parent.iterdir()) == [path]


def test_a_part_may_lie_elsewhere(tmp_path):
    write_text(tmp_path / "a", "ä", tmp_path / "mine")
    assert (tmp_path / "a").read_bytes() == "ä\n".encode() and [file.name for file in tmp_path.iterdir()] == ["a"]


def test_several_processes_write_the_same_facts_at_once(tmp_path):
    file, facts = tmp_path / "facts.json", {"teacher": "ä", "range": [1, 2.5]}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_facts(file, facts), range(200)))
    assert changed_facts(file, facts) == {} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("size", [0, 5, BLOCK + 1])
def test_a_digest_is_of_all_bytes(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert file_digest(tmp_path / "a") == hashlib.sha256(content[:size]).hexdigest()
    with (tmp_path / "a").open("rb") as file:
        assert file_digest(file) == hashlib.sha256(content[:size]).hexdigest()

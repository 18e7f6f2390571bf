import pytest

from train.data import python_sources


def test_the_standard_library_gives_thousands_of_docstrings_with_their_sources():
    found = list(python_sources.definitions())
    named = {(d.module, d.name): d for d in found}
    assert sum(bool(d.docstring) for d in found) > 3000
    dump = named["json", "dump"]
    assert dump.kind == "function" and dump.docstring.startswith("Serialize ``obj``")
    assert dump.source.startswith("def dump(") and dump.source.rstrip().endswith("fp.write(chunk)")
    assert ("json.decoder", "JSONDecoder.decode") in named


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        python_sources.python_files(["no_such_package"])

"""What the build recorded, what was loaded, and the words of every reason why not."""

from __future__ import annotations

import pytest

from ptv2_engine import _native, build_info


def test_build_report_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not := _native.load():
        pytest.skip(why_not)  # a run that must have the kernels says so: pytest --expect native
    report = build_info.report()
    assert report["why_not"] is None and report["loaded"] in report["build"]["archs"]
    built = report["build"]
    for change, words in (({"archs": [], "reason": "no C++ compiler found at install"}, "not built .no C.. compiler found"),
                          ({"torch": "1.0"}, "built with torch 1.0, but torch .* is running"),
                          ({"archs": ["avx1024"]}, "of the libraries built .avx1024. it has none")):
        monkeypatch.setattr(build_info, "recorded", lambda change=change: built | change)
        reason, arch = _native._load(None)
        assert arch is None
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(reason)


def test_a_package_that_was_never_installed_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(build_info, "_FILE", tmp_path / "_build_info.json")
    assert "never installed" in build_info.recorded.__wrapped__()["reason"]
    (tmp_path / "_build_info.json").write_text("{")
    assert "damaged" in build_info.recorded.__wrapped__()["reason"]

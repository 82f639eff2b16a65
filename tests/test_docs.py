"""What the documentation shows is what the package does."""

import runpy

from tests.helpers import ROOT


def test_the_picture_of_exactness_is_what_the_watershed_computes():
    script = runpy.run_path(str(ROOT / "docs" / "exactness.py"))
    assert script["draw"]() == (ROOT / "docs" / "exactness.svg").read_text(encoding="utf-8")

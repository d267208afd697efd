"""Text that ships with the package, so that nothing is downloaded: books to calibrate on, others to score on."""

from __future__ import annotations

import gzip
from importlib.resources import files

#: 25 public-domain books, an excerpt of each: 286,000 tokens of SmolLM2
CALIBRATION = "calibration.txt.gz"
#: 10 other books by other authors: 34,849 tokens of SmolLM2; never calibrate on these
EVALUATION = "evaluation.txt.gz"


def read(name: str) -> str:
    """The bundled text called ``name``, line ends untouched."""
    return gzip.decompress(files(__name__).joinpath(name).read_bytes()).decode("utf-8")

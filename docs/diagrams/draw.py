"""Draw every diagram beside this file, in the colours of light and dark pages.

python docs/diagrams/draw.py            # NAME.d2 becomes NAME.svg
python docs/diagrams/draw.py --check    # fails if a drawing is not that of its text
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
D2 = [
    Path(sys.executable).parent / "d2",
    "--theme=0",
    "--dark-theme=200",
    "--pad=8",
    "--scale=1",
]


def main(*, checks: bool) -> None:
    differing = []
    with tempfile.TemporaryDirectory() as directory:
        for source in sorted(HERE.glob("*.d2")):
            drawing = source.with_suffix(".svg")
            drawn = Path(directory, drawing.name)
            subprocess.run([*D2, source, drawn], check=True, capture_output=True)
            if not drawing.exists() or drawing.read_bytes() != drawn.read_bytes():
                differing.append(drawing.name)
                if not checks:
                    drawing.write_bytes(drawn.read_bytes())
    if checks and differing:
        sys.exit(f"{', '.join(differing)}: not as its text says; run `nox -s diagrams`")


if __name__ == "__main__":
    main(checks="--check" in sys.argv)

"""`make bench-crop`: cropped networks against the plain networks they replace."""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    codes = [
        subprocess.run([sys.executable, "-m", f"tests.bench.{part}"]).returncode
        for part in ("crop_lossless", "crop_speed", "crop_digits")
    ]
    sys.exit(max(codes))

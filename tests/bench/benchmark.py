"""`make bench-benchmark`: fidelity against a bare loop, then agreement with ONNX Runtime's profiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).parent
    scripts = ("benchmark_fidelity.py", "profiler_agreement.py")
    sys.exit(max(subprocess.run([sys.executable, str(folder / script)], check=False).returncode for script in scripts))

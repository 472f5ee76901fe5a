"""Stand-ins for the converter and the quantizer of llama.cpp, in a folder like that of a build."""

import sys
from pathlib import Path

# Appends its arguments to calls.txt, and writes its type
CONVERTER = """
import sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with Path(__file__).with_name("calls.txt").open("a") as calls:
    calls.write(options["--outtype"] + "\\n")
print("INFO:hf-to-gguf:" + "x" * 9999)
Path(options["--outfile"]).write_bytes(b"GGUF" + options["--outtype"].encode())
"""
QUANTIZER = """#!{python}
import sys
from pathlib import Path
full, output, kind = sys.argv[1:]
print("WARNING: 3 of 9 tensor(s) required fallback quantization")
Path(output).write_bytes(Path(full).read_bytes() + kind.encode())
"""


def write_tools(folder: Path, converter: str = CONVERTER) -> Path:
    (folder / "build/bin").mkdir(parents=True, exist_ok=True)
    (folder / "convert_hf_to_gguf.py").write_text(converter)
    quantizer = folder / "build/bin/llama-quantize"
    quantizer.write_text(QUANTIZER.format(python=sys.executable))
    quantizer.chmod(0o755)
    return folder


def read_calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().split()

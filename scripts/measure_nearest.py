"""Peak memory of `nearest` with a bank of a million patches, and its time for an image against banks of fewer.

Both searches are measured where faiss-cpu is installed; its index is made at the first image.

    python scripts/measure_nearest.py [PATCHES]

Random features of 100 dimensions stand for a backbone's: neither memory nor time depends on what they say. An image is
a grid of 32 x 32 places, as of 256 x 256 pixels at a stride of 8. Every bank is measured in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

from tabulate import tabulate

FEATURES, PLACES, BATCH = 100, 32, 50
WORKER = """
import json, re, sys, time
from pathlib import Path
import torch
from blemish.models.nearest import NearestFeature

features, places, batch, patches, bank = map(int, sys.argv[1:6])
coreset, search = sys.argv[6:]

class Noise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = features
    def forward(self, x):
        return torch.randn(len(x), features, places, places)

class Tiles:
    def __iter__(self):
        return (torch.zeros(batch, 1, 8, 8) for _ in range(-(-patches // (batch * places**2))))

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

torch.manual_seed(0)
idle = peak()
model = NearestFeature(Noise(), bank=bank, coreset=coreset, search=search)
start = time.perf_counter()
model.fit(Tiles())
fitted, learned = time.perf_counter() - start, peak()
image = torch.randn(1, features, places, places)
with torch.inference_mode():
    start = time.perf_counter()
    model.expect(image)
    first = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(3):
        model.expect(image)
print(json.dumps([fitted, first, (time.perf_counter() - start) / 3, peak() - idle, peak()]))
"""


def measure(patches: int, bank: int, coreset: str, search: str) -> list[float]:
    """Seconds to fit, for the first image and for others, MiB above idle and in all."""
    numbers = map(str, (FEATURES, PLACES, BATCH, patches, bank))
    command = [sys.executable, "-c", WORKER, *numbers, coreset, search]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    figures: list[float] = json.loads(done.stdout)
    return figures


def main(patches: int) -> None:
    rows = []
    tenth = max(1, patches // 10)
    searches = ["exact", "faiss"] if find_spec("faiss") else ["exact"]
    banks = [(bank, "random", search) for bank in (patches, tenth) for search in searches]
    for bank, coreset, search in (*banks, (4000, "random", "exact"), (4000, "greedy", "exact")):
        fit, first, image, above, peak = measure(patches, bank, coreset, search)
        name = "all" if bank == patches else coreset
        times = [f"{fit:.1f}", f"{first:.1f}", f"{1000 * image:.0f}"]
        rows.append([f"{bank:,}", name, search, *times, f"{above:.0f}", f"{peak:.0f}"])
    headers = [
        "bank",
        "choice",
        "search",
        "s to fit",
        "s first image",
        "ms an image",
        "peak MiB above idle",
        "peak MiB",
    ]
    print(f"{patches:,} patches of {FEATURES} features\n")
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)

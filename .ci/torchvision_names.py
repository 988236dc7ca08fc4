"""Lets torchvision's wheel from PyPI be imported beside a torch for the CPU, where its compiled part does not load.

It declares the names of the operators that torchvision looks for. That is enough for image processors, which are plain
torch. Python has to run it before anything imports torchvision: by a `.pth` file in site-packages.
"""

import importlib.util
import re
from pathlib import Path

import torch

found = importlib.util.find_spec("torchvision")
library = torch.library.Library("torchvision", "DEF")
source = Path(found.origin).with_name("_meta_registrations.py").read_text()
for name in {*re.findall(r'register_meta\("(\w+)"\)', source), *re.findall(r"torchvision::(\w+)", source)}:
    library.define(f"{name}(Tensor x) -> Tensor")

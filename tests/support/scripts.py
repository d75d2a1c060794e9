"""Scripts as modules."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def parser_of(script: Path) -> argparse.ArgumentParser | None:
    spec = importlib.util.spec_from_file_location(f"shown_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module.build_parser() if hasattr(module, "build_parser") else None

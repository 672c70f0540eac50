"""Packaging. The ranges here say what the code accepts; what is installed is pinned in requirements*.txt."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SHIPPED = {"launch": ("*.py", "*.sh", "*.sbatch"), "tools": ("*.py",), "configs": ("*/*.yaml", "*/*.jinja")}
"""Files beside the packages that a wheel has in llm/_shipped (llm/shipped.py): as packages of their own, tools and
launch would take these names from everybody else."""


class BuildWithShipped(build_py):
    """Packages, and what lies beside them; an editable installation finds that in the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, patterns in SHIPPED.items():
            for file in sorted(found for pattern in patterns for found in Path(folder).glob(pattern)):
                target = Path(self.build_lib, "llm", "_shipped", file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


RUNTIME = [
    "torch>=2.11",
    "deepspeed==0.19.8",  # llm/parallel/engine/deepspeed_private.py reads private attributes of exactly this version
    "fairscale==0.4.13",
    "fire>=0.7",
    "jinja2>=3.1.6",
    "numpy>=2.0",
    "pillow>=11",
    "plotly>=6.0",  # plotly.js of reports; its Python is never imported
    "pyarrow>=16",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tensorboard>=2.17",
    "tiktoken>=0.9",
    "tokenizers>=0.21",
    "tqdm>=4.66",
]

setup(
    name="lattice-llm",
    version="0.1.0",
    description="Distributed training of large transformer models: one model, any layout, one answer",
    python_requires=">=3.11",
    packages=find_packages(include=["llm", "llm.*", "vision", "vision.*"]),
    cmdclass={"build_py": BuildWithShipped},
    entry_points={"console_scripts": ["lattice = llm.command.main:main"]},
    package_data={
        "llm.tokenizers.chat": ["templates/*.jinja"],
        "llm.evaluate": ["*.css"],
        "llm.report": ["*.css", "*.js"],
    },
    install_requires=RUNTIME,
    extras_require={
        "dev": ["pytest>=8", "ruff>=0.8", "mypy>=1.13", "transformers>=5.0", "types-PyYAML", "types-tqdm"],
        "eval": ["lm-eval>=0.4.13,<0.5"],  # llm/evaluate/lm_eval.py
        "chem": ["rdkit>=2024.3", "scikit-learn>=1.4"],  # augment: enumerate_smiles; tools about molecules
        "export": ["onnx>=1.20", "onnxscript>=0.5", "onnxruntime>=1.23"],  # tools/export.py --format onnx
        "mamba": ["mamba-ssm==2.3.2.post1"],  # llm/kernels/fused_ssd.py knows what this version indexes
        "lightning": ["lightning>=2.5"],  # llm/siblings/miniformer_lightning.py
        "wandb": ["wandb>=0.17"],  # log.wandb
        "gpu": ["nvidia-ml-py>=12"],  # names the GPU and its power cap in benchmark results
    },
)

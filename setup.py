from pathlib import Path

from setuptools import setup

clip = ["open_clip_torch>=3.0", "numpy", "pillow>=10.1", "tqdm"]
evaluation = [*clip, "torchmetrics"]
demo = [*clip, "matplotlib", "scikit-learn"]
app = [*demo, "gradio>=6.31"]
sam3 = ["transformers>=5.0"]
sklearn = ["scikit-learn>=1.6"]
test = [
    *app,
    *evaluation,
    *sklearn,
    "hypothesis",
    "pytest>=8.4",
    "pytest-benchmark",
    "pytest-xdist",
    "selenium>=4",
    "setuptools>=77",
    # The extra brings a version of Hugging Face's `kernels` that this transformers accepts.
    # Older than 5.10, it takes the folder `kernels/` for that package and trips on its version.
    "transformers[kernels]>=5.10",
]
lint = ["mypy==2.4.1", "ruff==0.17.6"]

ROOT = Path(__file__).parent
# A checkout without symbolic links (git on Windows) has a text file in the place of the link.
# setuptools' plain editable install finds no folder elsewhere that lacks an __init__.py.
LINKED = (ROOT / "scclip_fast" / "kernels").is_dir()

SUBPACKAGES = (
    *("app", "chunked", "cli", "clip", "distributed", "evaluate", "ops", "plots", "sam3", "scenes"),
    *("segment", "sklearn", "kernels", "kernels.aggregate_details", "kernels.knn_details"),
)

setup(
    name="scclip_fast",
    version="0.1.0",
    description="SC-CLIP for CLIP and SAM 3 as fused Triton kernels, with PyTorch fallbacks",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=["CLIP", "SAM", "segmentation", "local outlier factor", "Triton"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # scclip_fast/kernels is a link to ../kernels; wheel and sdist hold the files themselves.
    package_dir={} if LINKED else {"scclip_fast.kernels": "kernels"},
    options={} if LINKED else {"editable_wheel": {"mode": "strict"}},
    packages=["scclip_fast", *(f"scclip_fast.{name}" for name in SUBPACKAGES)],
    package_data={
        "scclip_fast": ["py.typed"],
        "scclip_fast.evaluate": ["names/*.txt"],
        "scclip_fast.kernels.knn_details": ["README.md"],
        "scclip_fast.scenes": ["*.json", "*.safetensors"],
    },
    install_requires=["torch>=2.8", 'triton>=3.4; platform_system == "Linux"'],
    extras_require={
        "app": app,
        "clip": clip,
        "eval": evaluation,
        "demo": demo,
        "sam3": sam3,
        "sklearn": sklearn,
        "test": test,
        "lint": lint,
    },
    entry_points={"console_scripts": ["scclip-fast = scclip_fast.cli:main"]},
)

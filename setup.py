"""Where the packages lie; everything else is in pyproject.toml.

The folder `kernels/` has no `__init__.py`: a top-level package named `kernels` would shadow Hugging Face's package of that
name, which transformers imports. Its package is `sctd_kernels`, one level down. The configurations of `ds_configs/` are
installed inside of `sctd_ds`, where `--deepspeed_config base` finds them.
"""

from setuptools import find_packages, setup

setup(
    packages=["sctd_kernels", *find_packages(include=["sctd_ds", "sctd_ds.*"]), "sctd_ds.ds_configs"],
    package_dir={"sctd_kernels": "kernels/sctd_kernels", "sctd_ds.ds_configs": "ds_configs"},
    package_data={"sctd_ds": ["py.typed"], "sctd_kernels": ["py.typed"], "sctd_ds.ds_configs": ["*.json"]},
)

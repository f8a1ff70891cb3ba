"""The one thing pyproject.toml cannot say: the C kernel, which the install goes on without where there is no compiler."""

import sysconfig

from setuptools import Extension, setup

free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no stable ABI

setup(
    ext_modules=[
        Extension(
            "medshard_protocol._gf256",
            sources=["protocol/medshard_protocol/_gf256.c"],
            depends=["protocol/medshard_protocol/_gf256_kernel.h"],
            extra_compile_args=["-O3"],  # some interpreters were built with less, and pass that on
            py_limited_api=not free_threaded,
            optional=True,
        )
    ],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}},
)

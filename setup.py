"""What pyproject.toml has no words for: the compiled search, a plain shared library that ctypes opens.

Where there is no C compiler the installation goes on without it. Nothing is compiled for one processor alone
(-march=native), as an environment may be moved: the library looks for itself what it runs on.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "models.native._residual_argmin",
            sources=["models/native/residual_argmin.c"],
            depends=["models/native/residual_search.h"],
            extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
    ]
)

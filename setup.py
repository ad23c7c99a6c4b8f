"""What pyproject.toml has no words for: what is compiled, plain shared libraries that ctypes opens.

Where there is no C compiler the installation goes on without them. Nothing is compiled for one processor alone
(-march=native), as an environment may be moved: each looks for itself what it runs on.
"""

from setuptools import Extension, setup

LIBRARIES = {
    "_residual_argmin": ("residual_argmin.c", "residual_kinds.h", "residual_search.h", "threads.h"),
    "_packed_bert": (
        "packed_bert.c",
        "bert_layers.h",
        "bert_numbers.h",
        "bert_products.h",
        "bert_schedule.h",
        "threads.h",
    ),
}

setup(
    ext_modules=[
        Extension(
            f"models.native.{name}",
            sources=[f"models/native/{source}"],
            depends=[f"models/native/{header}" for header in headers],
            extra_compile_args=["-O3", "-g0", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-pthread"],
            extra_link_args=["-pthread"],
            libraries=["m"],
            optional=True,
        )
        for name, (source, *headers) in LIBRARIES.items()
    ]
)

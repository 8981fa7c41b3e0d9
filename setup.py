"""The two things that pyproject.toml can't say: which folders are packages, and the optional compiled code."""

from setuptools import Extension, find_packages, setup

HEADERS = ("calls", "exchange", "likeness", "probes", "python", "rows", "stacks", "versions")
PATTERN = [f"msprobe_graph/taps/pattern/{name}.h" for name in HEADERS]

WRITING = [f"msprobe_graph/dump/writing/{name}.h" for name in ("files", "lane", "numbers")]


def cpp(source, name, *flags, **given):
    """An optional library of one C++ file; both names are relative to the package."""
    return Extension(
        f"msprobe_graph.{name}",
        sources=[f"msprobe_graph/{source}"],
        extra_compile_args=["-O3", "-std=c++17", *flags],
        language="c++",
        optional=True,
        **given,
    )


setup(
    # The top-level folder eager/ is installed as msprobe_graph.eager: site-packages gets no package called "eager".
    packages=[
        *find_packages(include=["msprobe_graph", "msprobe_graph.*"]),
        *(f"msprobe_graph.{name}" for name in find_packages(include=["eager", "eager.*"])),
    ],
    package_dir={"msprobe_graph.eager": "eager"},
    ext_modules=[
        # Plain C, loaded with ctypes: no PyInit, no Python and no torch headers. Without a compiler it is left out, and
        # msprobe_graph.taps falls back on torch operations. No -ffast-math: NaN and Inf are what it looks for.
        Extension(
            "msprobe_graph.taps._statistics",
            sources=["msprobe_graph/taps/statistics.c"],
            extra_compile_args=["-O3"],
            libraries=["m"],
            optional=True,
        ),
        # Plain C++ of CPython's, no torch headers. Without it calls are described anew in each step.
        cpp("taps/pattern/pattern.cpp", "taps._pattern", depends=PATTERN),
        # Without it steps are encoded and written by Python, several times slower, in turns with the model.
        cpp("dump/writing/writing.cpp", "dump._writing", "-pthread", depends=WRITING, extra_link_args=["-pthread"]),
        # Without it acl_save saves nothing from inside CUDA graphs, and says so.
        cpp("taps/host_queue.cpp", "taps._host_queue", "-pthread", extra_link_args=["-pthread"]),
    ],
)

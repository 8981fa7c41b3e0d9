"""The two things that pyproject.toml can't say: which folders are packages, and the optional compiled code."""

from setuptools import Extension, find_packages, setup

PATTERN = ("calls", "exchange", "likeness", "probes", "python", "rows", "stacks")

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
        Extension(
            "msprobe_graph.taps._pattern",
            sources=["msprobe_graph/taps/pattern/pattern.cpp"],
            depends=[f"msprobe_graph/taps/pattern/{name}.h" for name in PATTERN],
            extra_compile_args=["-O3", "-std=c++17"],
            language="c++",
            optional=True,
        ),
        # Without it what CUDA graphs replay is encoded by Python, several times slower.
        Extension(
            "msprobe_graph.dump._template",
            sources=["msprobe_graph/dump/template.cpp"],
            extra_compile_args=["-O3", "-std=c++17"],
            language="c++",
            optional=True,
        ),
        # Without it a step's files are written by Python, which waits for its lock after each call of the system.
        Extension(
            "msprobe_graph.dump._folder",
            sources=["msprobe_graph/dump/folder.cpp"],
            extra_compile_args=["-O2", "-std=c++17"],
            language="c++",
            optional=True,
        ),
        # Without it acl_save saves nothing from inside CUDA graphs, and says so.
        Extension(
            "msprobe_graph.taps._host_queue",
            sources=["msprobe_graph/taps/host_queue.cpp"],
            extra_compile_args=["-O2", "-std=c++17", "-pthread"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        ),
    ],
)

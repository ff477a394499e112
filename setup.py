"""The one thing that pyproject.toml cannot say: a native library that is neither required nor a Python module.

It has a plain C interface and is loaded through ctypes, so one build fits every Python; where no compiler is at hand
the install goes on without it, the torch twins of its kernels serve, and the server says so when it starts.
"""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ATTENTION = ("attention", "attention_amx", "attention_bf16", "attention_f32")
LINEAR = ("linear", "linear8", "linear8_amx", "linear_amx")
SOURCES = ("amx", *ATTENTION, "crew", "encoder", "level", *LINEAR, "pages", "rows")
HEADERS = (
    *("amx", "attention", "attention_batch", "attention_lanes", "crew"),
    *("linear", "linear8", "linear_blocks", "linear_shares", "linear_tiles", "rows", "transpose", "vector"),
)
# With it kernels/native.py tells a library that was left from before an upgrade.
TREE = sorted(Path("src/carpool/kernels/cpu").glob("*.[ch]*"))
DIGEST = sha256(b"".join(path.read_bytes() for path in TREE)).hexdigest()


class NativeLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    cmdclass={"build_ext": NativeLibrary, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "carpool.kernels._native",
            [f"src/carpool/kernels/cpu/{name}.cpp" for name in SOURCES],
            depends=[f"src/carpool/kernels/cpu/{name}.h" for name in HEADERS],
            define_macros=[("CARPOOL_SOURCES", f'"{DIGEST}"')],
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-Wno-psabi",  # vectors never cross a function that is not inlined
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
)

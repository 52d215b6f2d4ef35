"""Compiling a recording with inductor, torch's compiler.

Inductor turns the operations into C++, for which it takes half a minute where a recording has a thousand. On a CPU the
result is a library, which is kept under a name that stands for everything that it depends on. The same step in another
run, with another seed, number of steps or learning rate, loads it within milliseconds.
"""

import hashlib
import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from metarun.data.cache import cache_dir
from metarun.engine.library import Library
from metarun.engine.products import FLAGS, SOURCE, compiled_products, with_fast_products
from metarun.engine.recorder import CannotRecord
from metarun.system.files import held_or_made, write_text

log = logging.getLogger(__name__)

Options = dict[str, Any]
"""Inductor's options."""
Compiled = Callable[..., list[Tensor]]
"""Leaves of the input → leaves of the output."""
ON_CPU = {"layout_optimization": False, "cpp.vec_isa_ok": True, "cpp_cache_precompile_headers": False}
"""Images keep their layout. What the processor says of itself is believed (building a program for each of its vector
instructions takes 10 s), and headers are not compiled by themselves, which pays from the third library on."""
IN_THREADS = {"cpp_wrapper": True}
"""Calls between kernels are made in C++, which leaves Python's lock to other threads. For what cannot be a library."""
AS_LIBRARY = {
    "memory_planning": True,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
"""Calls of kernels gain nothing from being optimized, which takes longer than to optimize the kernels. They are fewer,
and compile in two thirds of the time, where all intermediate results lie in one block of memory."""
WITH_RANDOM_NUMBERS = {"realize_opcount_threshold": 12}
"""Values that are used twice are stored after fewer operations. The compiler would otherwise compute them again for
each use, and since a line of ``metarun.random.mixed`` uses its input twice, a normal number would take 8,700
operations."""
STANDARD_LIBRARIES = b"libstdc++.so", b"libc++.so"
"""One of them is named by a library that shares C++'s standard library with torch. A library with its own copy ends the
process when it is loaded, as seen with g++ 13 of an image for GPUs: both copies use the same table of facets."""
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def ways(graph: Graph, constants: nn.Module, values: Sequence[Tensor], at_once: int) -> list[Callable[[], Compiled]]:
    """Return ways to compile the operations of a recording, of which the first that works is to be taken.

    Each is a function without arguments, which returns a function of the inputs that makes them contiguous. It raises
    errors of many classes where there is no compiler, or where the compiler refuses the graph.

    Args:
        graph: the operations.
        constants: the tensors that they name.
        values: contiguous examples of the inputs.
        at_once: how many threads will run the operations at once.
    """
    folder = compiler_cache()
    more: Options = WITH_RANDOM_NUMBERS if draws_numbers(graph) else {}
    on_cpu = values[0].device.type == "cpu"

    def way(compile_by: Callable[..., Compiled], *arguments: Any) -> Compiled:
        return on_contiguous(compile_by(with_fast_products(graph, constants), values, *arguments))

    plain = partial(way, in_memory, more)
    if not on_cpu:
        return [plain]
    library = partial(way, as_library, ON_CPU | AS_LIBRARY | more, folder, at_once)
    if at_once == 1:
        return [library, plain]
    for_threads = partial(way, in_memory, ON_CPU | IN_THREADS | more)
    return [for_threads, plain] if is_looked_up(graph) else [library, for_threads, plain]


def require_compiler() -> None:
    """Raise the error that inductor would raise after half a minute where there is no C++ compiler."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:
        return
    get_cpp_compiler()


def in_memory(module: GraphModule, values: Sequence[Tensor], options: Options) -> Compiled:
    """Compile operations for this process."""
    # The compiler is given the recording itself: with ``torch.compile`` each call would first check that its
    # surroundings have not changed, which costs as much as half of a small step.
    import torch._inductor

    if values[0].device.type == "cpu":
        require_compiler()
    log.info("Compiling the meta-step, which takes up to a minute.")
    with torch.no_grad():
        run: Compiled = torch._inductor.compile(module, list(values), options=options)
    return run


def as_library(
    module: GraphModule, values: Sequence[Tensor], options: Options, folder: Path | None, at_once: int
) -> Compiled:
    """Compile operations to a library, unless it is there; ``folder``, where libraries are kept, may be None."""
    if folder is None:
        require_compiler()
        with tempfile.TemporaryDirectory() as place:
            return loaded(built(module, values, options, Path(place)), at_once)
    path = path_of(module, values, options, folder)

    def read() -> Compiled | None:
        # The system ends a process that loads a damaged library.
        try:
            whole = checksum(path) == path.with_suffix(".sha256").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        return loaded(path, at_once) if whole else None

    return held_or_made(path, read, lambda: loaded(made(module, values, options, path), at_once))


def made(module: GraphModule, values: Sequence[Tensor], options: Options, path: Path) -> Path:
    """Compile operations to the library ``path``, and write its checksum next to it."""
    require_compiler()
    log.info("Compiling the meta-step, which takes up to a minute; later runs with the same step load it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        library = built(module, values, options, Path(place))
        write_text(path.with_suffix(".sha256"), checksum(library))
        if (calls := library.with_suffix(".json")).exists():
            calls.replace(path.with_suffix(".json"))
        return library.replace(path)


def checksum(path: Path) -> str:
    """Return a hash of a library and of what stands next to it."""
    calls = path.with_suffix(".json")
    return hashlib.sha256(path.read_bytes() + (calls.read_bytes() if calls.exists() else b"")).hexdigest()


def built(module: GraphModule, values: Sequence[Tensor], options: Options, place: Path) -> Path:
    """Compile operations to a library in a folder; the ``.json`` next to it describes calls that torch has to make."""
    import torch._inductor
    from torch._inductor.compile_fx import compile_fx_aot

    path = place / "step.so"
    known = set(torch._inductor.list_options())
    patches = {name: value for name, value in options.items() if name in known}
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        without_warnings("torch._inductor.ir"),
        on_all_cores(patches, place),
    ):
        # The compiler warns of its own code.
        warnings.simplefilter("ignore")
        compile_fx_aot(module, list(values), config_patches=patches | {"aot_inductor.output_path": str(path)})
    # What torch has no stable C function for, such as linear algebra, is looked up by the library's own name.
    for calls in list(place.glob("*.json")):
        if not calls.stem.endswith("_metadata"):
            calls.replace(path.with_suffix(".json"))
    return path


@contextmanager
def on_all_cores(patches: Options, place: Path) -> Iterator[None]:
    """Inside, the C++ compiler works while inductor does, which would wait for it each time.

    While the graph is lowered, small programs find out what the C++ compiler knows of the processor (1.5 s), and the
    products of small matrices are compiled (1 s), which are linked into the library. Later the calls of kernels are
    compiled next to the kernels themselves (5 s each), and linking waits for both.
    """
    import torch._inductor.config
    import torch._inductor.cpp_builder
    from torch._inductor import cpu_vec_isa

    cpp_builder: Any = torch._inductor.cpp_builder
    run, waiting = cpp_builder.run_compile_cmd, list[Future[Any]]()

    def run_or_begin(command: str, cwd: str) -> Any:
        if ".wrapper.o" in command and " -c " in command:
            if products.result():
                command += " -Daoti_torch_cpu_bmm_out=metarun_bmm_out"
            # The caller removes its folder at once, in which nothing is looked for.
            waiting.append(pool.submit(copy_context().run, run, command, tempfile.gettempdir()))
            return None
        if " -c " not in command:
            while waiting:
                waiting.pop().result()
        if ".wrapper.o" in command and products.result():
            command += f" {products.result()}"
        return run(command, cwd)

    with ThreadPoolExecutor(1) as pool, torch._inductor.config.patch(patches):
        pool.submit(copy_context().run, cpu_vec_isa.pick_vec_isa)
        products = pool.submit(compiled_products, place, torch.get_num_threads())
        cpp_builder.run_compile_cmd = run_or_begin
        try:
            yield
        finally:
            cpp_builder.run_compile_cmd = run


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Inside, a logger only logs errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def loaded(path: Path, at_once: int) -> Compiled:
    """Load a library, to be run by up to ``at_once`` threads at once.

    Raises:
        CannotRecord: several threads cannot run it at once, or it would end the process.
        OSError: it cannot be loaded.
    """
    if sys.platform == "linux" and not any(map(path.read_bytes().__contains__, STANDARD_LIBRARIES)):
        raise CannotRecord("the C++ compiler puts its standard library into what it links, next to that of torch")
    if not path.with_suffix(".json").exists():
        return Library(path, at_once)
    if at_once > 1:
        raise CannotRecord("it calls operations that only torch can look up, one thread at a time")
    runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
    return lambda *inputs: runner.run(list(inputs))


def path_of(module: GraphModule, values: Sequence[Tensor], options: Options, folder: Path) -> Path:
    """Return where a library is kept, by a hash of operations, sizes, settings, torch and the processor."""
    held = hashlib.sha256()
    for text in (
        module.code,
        str(options),
        SOURCE.read_text(encoding="utf-8"),
        str(FLAGS),
        *surroundings(),
    ):
        held.update(text.encode() + b"\0")
    for value in (*module.state_dict().values(), *values):
        held.update(f"{list(value.shape)} {value.dtype} {value.device}".encode())
    for value in module.state_dict().values():
        held.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return folder / "libraries" / f"{held.hexdigest()[:32]}.so"


def surroundings() -> Iterator[str]:
    """Yield what a compiled step depends on besides its operations."""
    yield f"{torch.__version__} {torch.version.git_version} {torch.get_num_threads()}"
    yield f"{torch.get_float32_matmul_precision()} {torch.backends.mkldnn.enabled}"
    yield f"{torch.are_deterministic_algorithms_enabled()} {platform.machine()} {platform.processor()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        yield from sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        pass
    settings = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "ATEN_CPU_", "CXX")
    for key, value in sorted(os.environ.items()):
        if key.startswith(settings) and key != CACHE_VARIABLE:
            yield f"{key}={value}"


def on_contiguous(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return ``run`` with its inputs made contiguous."""
    return lambda *inputs: run(*(x.contiguous() for x in inputs))


def is_looked_up(graph: Graph) -> bool:
    """Whether a library would call operations, linear algebra, that only torch's own class for it can look up."""
    return any("linalg" in str(node.target) for node in graph.nodes)


def draws_numbers(graph: Graph) -> bool:
    """Whether the recording contains random numbers from seeds (``metarun.random``)."""
    return any(node.target is torch.ops.aten.bitwise_xor.Tensor for node in graph.nodes)


def compiler_cache() -> Path | None:
    """Return the folder where compiled graphs are kept between runs; torch's own variable overrides it.

    Return None where our folder cannot be written: the compiler then uses its own, in the system's temporary folder.
    """
    # Importing the compiler sets the variable to that temporary folder, which the user has not asked for.
    default = str(Path(tempfile.gettempdir(), "torchinductor_"))
    if not os.environ.get(CACHE_VARIABLE, default).startswith(default):
        return Path(os.environ[CACHE_VARIABLE])
    path = (cache_dir() / "compiled").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Only trying to write tells whether writing is allowed.
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        log.debug("The compiler's cache cannot be written: %s", error)
        os.environ.pop(CACHE_VARIABLE, None)
        return None
    os.environ[CACHE_VARIABLE] = str(path)
    return path

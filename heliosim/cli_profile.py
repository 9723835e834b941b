"""``heliosim profile compose | import | diff | memory``: profiles without a GPU, and what to make of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliosim.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from heliosim.composing import Wanted
    from heliosim.operators.tables import OperatorTables

FORMS = ("aiconfigurator", "llmservingsim", "vidur")
USED = {"aiconfigurator": ("--kernels", "--tables"), "llmservingsim": (), "vidur": ("--kernels", "--all-reduce")}
"""Options that mean something to a form alone."""
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the profile to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of synthetic exits.")]
Behaviour = Annotated[
    str, typer.Option(help="Exits: none, synthetic, an exit spec (name or YAML), or a profile whose exits to take.")
]
Extrapolate = Annotated[bool, typer.Option("--allow-extrapolation", help="Go beyond the fitted range, and say so.")]
EXITS_HELP = "Exit layers, separated by commas; once for all models, or once for each. Default: the last layer alone."


def compose(
    model: Annotated[list[str], typer.Option(help="Shipped architecture, config.json or its folder; may be repeated.")],
    device: Annotated[str, typer.Option(help="Shipped device or device file.")],
    out: Out,
    tp: Annotated[str, typer.Option(help="GPUs that share each layer; one for all models, or one each: 4,2.")] = "1",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp16",
    exits: Annotated[list[str] | None, typer.Option(help=EXITS_HELP)] = None,
    exit_kind: Annotated[
        str, typer.Option(help="anywhere (the model's own head) or fixed (trained heads).")
    ] = "anywhere",
    host: Annotated[str, typer.Option(help="Host preset of the device: graph, compiled, eager, ...")] = "graph",
    behaviour: Behaviour = "none",
    seed: Seed = 0,
    allow_extrapolation: Extrapolate = False,
    overwrite: Overwrite = False,
) -> None:
    """Compose a profile of models on a GPU nobody has at hand, from shapes and the device's efficiency curves."""
    from heliosim.composing import compose_profile
    from heliosim.hardware.device import open_device
    from heliosim.profile_view import show_profile

    profile = compose_profile(
        out,
        wanted_models(model, tp, exits or [], exit_kind),
        open_device(device),
        dtype=dtype,
        host=host,
        behaviour=behaviour,
        seed=seed,
        allow_extrapolation=allow_extrapolation,
        files=digests(*model, device),
        overwrite=overwrite,
    )
    show_profile(profile)
    typer.echo(f"\nComposed profile written to {out}")


def import_tables(
    form: Annotated[str, typer.Argument(help=f"Form of the tables: {', '.join(FORMS)}.")],
    folder: Annotated[Path, typer.Argument(help="Folder that holds them.")],
    model: Annotated[str, typer.Option(help="Shipped architecture, config.json or its folder: the model profiled.")],
    device: Annotated[str, typer.Option(help="Name of the GPU they were measured on.")],
    memory_gib: Annotated[float, typer.Option(min=1, help="Memory of one GPU, GiB.")],
    out: Out,
    tp: Annotated[str, typer.Option(help="GPUs that shared each layer.")] = "1",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "bf16",
    exits: Annotated[str, typer.Option(help="Exit layers, separated by commas. Default: the last layer alone.")] = "",
    step_ms: Annotated[float, typer.Option(min=0, help="Host time per step, ms: tables of kernels hold none.")] = 1.0,
    row_us: Annotated[float, typer.Option(min=0, help="Host time per row of a step, microseconds.")] = 0.0,
    max_context: Annotated[
        int | None, typer.Option(min=1, help="Longest context to fit; default: the tables'.")
    ] = None,
    link_gb_per_s: Annotated[float, typer.Option(min=0.1, help="Pinned host memory to the GPU, GB/s.")] = 25.0,
    kernels: Annotated[
        str | None, typer.Option(help="aiconfigurator, vidur: device whose curves stand for what the tables lack.")
    ] = None,
    all_reduce: Annotated[Path | None, typer.Option(help="vidur: all_reduce.csv, for more than one GPU.")] = None,
    tables: Annotated[
        str | None,
        typer.Option(help="aiconfigurator: part of the path of the tables to read, where there are several."),
    ] = None,
    behaviour: Behaviour = "none",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make a profile of operator times that were measured on a GPU of your own."""
    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS)
    from heliosim.composing import MEMORY_SHARE, operator_profile
    from heliosim.operators.fit import fit_operators
    from heliosim.profile_view import show_profile

    (wanted,) = wanted_models([model], tp, [exits] if exits else [], "anywhere")
    found, read = _tables(
        form, folder, wanted, dtype, {"--kernels": kernels, "--all-reduce": all_reduce, "--tables": tables}
    )
    a, memory = wanted.architecture, int(memory_gib * 2**30)
    room = MEMORY_SHARE * memory - a.weights_bytes(dtype, tp=wanted.tp)
    kv_tokens = int(room / (a.layers * a.kv_bytes(dtype, wanted.tp)))
    if kv_tokens <= 0:
        raise InputError("--memory-gib", memory_gib, f"the weights of {a.name} leave no room for KV", "Give more --tp.")
    fit = fit_operators(found, step_s=step_ms / 1e3, row_s=row_us / 1e6, max_context=max_context, kv_tokens=kv_tokens)
    profile = operator_profile(
        out,
        found,
        fit,
        wanted,
        device=device,
        memory_bytes=memory,
        dtype=dtype,
        host=f"{step_ms:g} ms per step, {row_us:g} us per row",
        link_bytes_per_s=link_gb_per_s * 1e9,
        assumptions=(
            f"the host adds {step_ms:g} ms per step and {row_us:g} us per row: given, not measured",
            f"weights come from pinned host memory at {link_gb_per_s:g} GB/s: given, not measured",
            *found.assumptions,
        ),
        behaviour=behaviour,
        seed=seed,
        files=digests(model, *map(str, read)),
        overwrite=overwrite,
    )
    show_profile(profile)
    typer.echo(f"\nComposed profile written to {out}")


def memory(
    profile: Annotated[str, typer.Argument(help="Profile folder, or the name of a shipped one.")],
    budget: Annotated[
        str | None, typer.Option(help="Memory of one GPU for all of it: '72 GB'. Default: nine tenths of the device's.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens each request holds, separated by commas.")] = "256,1024,4096",
    rows: Annotated[int, typer.Option(min=1, help="Rows that would be served if memory did not end.")] = 256,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the largest step (activations).")] = 2048,
    report: Annotated[Path | None, typer.Option(help="HTML file to write with the same in pictures.")] = None,
) -> None:
    """Weights by depth, the largest batch by depth and context, and where throughput falls off because KV ends."""
    from heliosim.composing import MEMORY_SHARE
    from heliosim.memory_view import print_memory
    from heliosim.profile_view import open_profile
    from heliosim.scenario import parse_bytes

    found = open_profile(profile)
    device = found.facts.device.get("gpu_memory_bytes")
    if budget is None and not isinstance(device, int):
        raise InputError("--budget", "", "the profile names no device memory", "Give one, such as '24 MB'.")
    try:
        most = parse_bytes(budget) if budget is not None else int(MEMORY_SHARE * int(device or 0))
    except ValueError as error:
        raise InputError("--budget", budget, str(error), "Give bytes, or a number with a unit: '72 GB'.") from None
    contexts = sorted({_whole(part, "--context") for part in context.split(",")})
    if contexts[0] < 1 or most < 1:
        raise InputError("--context", context, "must be 1 or more, as the budget", "Give positive numbers.")
    print_memory(found, most, contexts, rows, step_tokens)
    if report is not None:
        from heliosim.memory_report import write_memory_report

        write_memory_report(found, report, most, contexts, rows, step_tokens)
        typer.echo(f"\nReport written to {report}")


def _tables(
    form: str, folder: Path, wanted: Wanted, dtype: str, options: dict[str, str | Path | None]
) -> tuple[OperatorTables, list[Path]]:
    """The tables, and the files they were read from."""
    for option, value in options.items():
        if value is not None and option not in USED[form]:
            raise InputError(option, str(value), f"has no effect on {form}", "Leave it out.")
    if form == "llmservingsim":
        from heliosim.operators.llmservingsim import FILES, read_llmservingsim

        return read_llmservingsim(folder), [folder / name for name in FILES]
    from heliosim.hardware.device import open_device
    from heliosim.hardware.steps import StepTimes

    kernels, all_reduce, choice = (options[name] for name in ("--kernels", "--all-reduce", "--tables"))
    if kernels is None:
        lacking = "output head" if form == "vidur" else "element-wise kernels"
        remedy = "Name a device whose curves stand in, such as A100-80GB."
        raise InputError("--kernels", "", f"the tables of {form} hold no {lacking}", remedy)
    times = StepTimes.of(wanted.architecture, open_device(str(kernels)), dtype=dtype, tp=wanted.tp)
    if form == "aiconfigurator":
        from heliosim.operators.aiconfigurator import find_tables, read_aiconfigurator

        files = find_tables(folder, str(choice or ""))
        return read_aiconfigurator(files, times), list(files.values())
    from heliosim.operators.vidur import read_vidur

    reduced = None if all_reduce is None else Path(all_reduce)
    read = [folder / "mlp.csv", folder / "attention.csv", *([reduced] if reduced is not None else [])]
    return read_vidur(folder, times, reduced), [path for path in read if path.is_file()]


def device_file(
    profile: Annotated[str, typer.Argument(help="Profile folder, calibrated with --hardware full or --device-out.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Device file to write (JSON).")],
    base: Annotated[
        str | None,
        typer.Option(help="Device that stands in for what one GPU cannot show. Default: the shipped one most like it."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Write a device file of the machine a profile was measured on: other models can then be composed for it."""
    from heliosim_calibrate.hardware.device_file import write_device

    from heliosim.profile_view import open_profile

    device = write_device(open_profile(profile), out, base, overwrite=overwrite)
    for part, origin in device.origins().items():
        said = f"{origin.source}{f' ({origin.derivation})' if origin.derivation else ''}"
        typer.echo(f"  {part}: {said}")
    typer.echo(
        f"\nDevice file of {device.name} written to {out}. Compose with: heliosim profile compose --device {out}"
    )


def diff(
    a: Annotated[str, typer.Argument(help="Profile folder, or the name of a shipped one.")],
    b: Annotated[str, typer.Argument(help="The one to compare with it.")],
) -> None:
    """Compare two profiles: sizes, step times, loads, energy, exits. Exit code 0 if they are the same, 1 if not."""
    from heliosim.profile_diff import compare_profiles, print_diff
    from heliosim.profile_view import open_profile

    one, other = open_profile(a), open_profile(b)
    found = compare_profiles(one, other)
    print_diff(one, other, found)
    raise typer.Exit(0 if found.is_same else 1)


def digests(*given: str) -> dict[str, str]:
    """SHA-256 of the files that names or paths stand for, by name: shipped ones by their own, others by file name."""
    from heliosim.formats.files import sha256_of
    from heliosim.hardware.architecture import shipped_architectures
    from heliosim.hardware.device import shipped_devices

    shipped = {name.lower(): path for name, path in (shipped_architectures() | shipped_devices()).items()}
    found = {}
    for text in given:
        path = shipped.get(text.lower(), Path(text).expanduser())
        path = path / "config.json" if path.is_dir() else path
        found[path.stem if text.lower() in shipped else path.name] = sha256_of(path)
    return found


def _whole(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(option, text, "must be whole numbers", "Separate them by commas.") from None


def wanted_models(models: list[str], tp: str, exits: list[str], kind: str) -> list[Wanted]:
    """Options as they were given, one set per model. Raises InputError."""
    from heliosim.composing import Wanted
    from heliosim.hardware.architecture import open_architecture

    ranks = [_whole(part, "--tp") for part in tp.split(",")]
    layers = [tuple(_whole(part, "--exits") for part in text.split(",")) for text in exits]
    for option, given, some in (("--tp", tp, ranks), ("--exits", exits, layers)):
        if len(some) not in ((1, len(models)) if option == "--tp" else (0, 1, len(models))):
            raise InputError(option, given, f"{len(some)} given for {len(models)} models", "Give one, or one for each.")
    found: list[Wanted] = []
    for k, name in enumerate(models):
        architecture = open_architecture(name)
        if any(architecture.name == w.name for w in found):
            raise InputError("--model", name, "stands twice", "Name each model once.")
        own = (layers[k] if len(layers) > 1 else layers[0]) if layers else ()
        found.append(Wanted(architecture.name, architecture, ranks[k] if len(ranks) > 1 else ranks[0], own, kind))
    return found

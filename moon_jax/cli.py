"""The command line. Errors of the user's are one line and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import json
import logging
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import NoReturn

from moon_jax import config as config_lib
from moon_jax import interrupt, places
from moon_jax.config import UserError

DESCRIPTION = """\
MOON2.0 in JAX: one model embeds a product from its text, its image or both into one space.

examples:
  moon-jax quickstart                                              the whole method on a rendered catalogue
  moon-jax quickstart --data catalogue/ --workdir runs/first       on your own
  moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data catalogue/ --workdir runs/2b
  moon-jax export --model runs/2b --output served --verify
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:4x4x4     what a step costs there, before renting it
  moon-jax train --help
"""

QUICKSTART = """\
The main job, small: trains MOON2.0 from scratch on a catalogue, judges it zero-shot (retrieval in all nine directions
of text, image and both; categories and attributes by label texts), and leaves model, scores, pictures and the vectors
of what was to be found in the workdir. 160 steps, about four minutes on two CPU cores. Without --data it renders a
synthetic catalogue first. The same command again resumes.

examples:
  moon-jax quickstart
  moon-jax quickstart --data catalogue/ --workdir runs/first
  moon-jax quickstart --data products.parquet --workdir runs/short --steps 50
  moon-jax quickstart --data catalogue/ --workdir runs/dense --config.experts.count=0
  moon-jax quickstart --workdir runs/nested '--config.objective.matryoshka=(32,64)'

--config.a.b=VALUE changes any option of the config; moon_jax/config.py has them all with their meaning.
"""


TRAIN = """\
Trains a config on a catalogue; the same command again resumes, on any number of hosts or devices. With --init the run
begins from public weights, of Qwen3-VL 2B to 30B-A3B or of Qwen3-VL-Embedding, or from another run's workdir. Where the
config wants experts and the weights are dense, every expert begins as a copy of the dense feed-forward. Sizes, pooling
and template are those of the weights, unless the config says otherwise. Several processes find each other on TPU pods
and SLURM, else by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; launch/ has scripts.

examples:
  moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data catalogue/ --workdir runs/2b
  moon-jax train --config moon2_qwen3vl_2b --init models/Qwen3-VL-Embedding-2B --data catalogue/ --workdir runs/emb
  moon-jax train --config quickstart --data catalogue/ --workdir runs/scratch --steps 500
  moon-jax train --config moon2_qwen3vl_8b --init models/Qwen3-VL-8B-Instruct --data catalogue/ --workdir runs/8b \\
    --config.mesh.fsdp=8 --config.experts.redrawn=0.5
  moon-jax train --config quickstart --workdir runs/more --init runs/scratch --config.training.optimizer=lion
  moon-jax train --config quickstart --workdir runs/watched --config.evaluation.every=50 --profile 10:15
  moon-jax train --config quickstart --workdir gs://bucket/runs/first    in a bucket; needs pip install -e '.[gcs]'

--init takes a folder, gs://bucket/folder of another run, or hf://owner/name[@revision] of the Hugging Face hub; nothing
else asks the network beyond the hosts of the run.
--config.a.b=VALUE changes any option of the config; moon_jax/config.py has them all with their meaning.
"""

EXPORT = """\
Writes a model as a Hugging Face folder, qwen3_vl_moe where it has experts and qwen3_vl where it has none, for
transformers, sentence-transformers and the servers built on them. --verify embeds a text, an image and both with
transformers on this machine, and fails where they differ from ours (it needs: pip install -e '.[hf]').

examples:
  moon-jax export --model moon-jax-quickstart --output served
  moon-jax export --model runs/2b --output served --dtype bfloat16 --verify
"""


PLAN = """\
Compiles the real training step of a config ahead of time for a TPU slice that is not here, and tells per chip: memory
against what the chip has, FLOPs, bytes moved, collectives, and the step that these would take at full speed with all of
it overlapped: a bound, not a forecast. It needs libtpu (pip install -e '.[tpu]') but no TPU, and a minute or several.
--mesh compares layouts. Without --topology the step is compiled for this machine, and timed on it.

examples:
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:4x4x4
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p-128 --mesh fsdp=-1 --mesh data=-1,fsdp=4,expert=4
  moon-jax plan --config moon2_qwen3vl_2b --topology v5p:8x8x8 --slices 2 --config.data.batch=4096
  moon-jax plan --config quickstart
"""


class Parser(argparse.ArgumentParser):
    """Mistakes are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help has examples")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The command with its flags, and the overrides `--config.a.b=value`.

    Raises:
        UserError: anything else that was given; names the closest flag.
    """
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser("moon-jax", description=DESCRIPTION, **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    quickstart = commands.add_parser(
        "quickstart", help="train on a catalogue and judge the model, in minutes", description=QUICKSTART, **layout
    )
    quickstart.add_argument(
        "--data", help="a .parquet or .jsonl file of products, or a folder of them; default: rendered ones"
    )
    quickstart.add_argument(
        "--workdir", default="moon-jax-quickstart", help="where the run lives (default: %(default)s)"
    )
    quickstart.add_argument("--steps", type=int, help="training steps, in place of the config's")
    quickstart.add_argument("--config", help="a config that is shipped (quickstart, the default), or a file")
    train = commands.add_parser(
        "train", help="train a config, from public weights or from scratch", description=TRAIN, **layout
    )
    train.add_argument("--config", required=True, help="a config that is shipped, or a file")
    train.add_argument(
        "--data", help="a .parquet or .jsonl file of products, or a folder of them; default: rendered ones"
    )
    train.add_argument("--workdir", required=True, help="where the run lives: a folder, or gs://bucket/folder")
    train.add_argument(
        "--init", help="a workdir, a Hugging Face folder or hf://owner/name to begin from; default: random weights"
    )
    train.add_argument("--steps", type=int, help="training steps, in place of the config's")
    train.add_argument("--profile", metavar="FIRST:LAST", help="a profiler trace of these steps, counted from 1")
    train.add_argument(
        "--stall-minutes", type=float, default=10.0, help="without a step for so long, show all stacks (default: 10)"
    )
    export = commands.add_parser("export", help="write a Hugging Face folder", description=EXPORT, **layout)
    export.add_argument("--model", required=True, help="a workdir, a Hugging Face folder, or hf://owner/name")
    export.add_argument("--output", required=True, help="a folder that is new or empty")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights; default: the parameters' own")
    export.add_argument("--verify", action="store_true", help="compare embeddings with transformers")
    plan = commands.add_parser(
        "plan", help="what a training step will cost on a machine that is not here", description=PLAN, **layout
    )
    plan.add_argument("--config", required=True, help="a config that is shipped, or a file")
    plan.add_argument("--topology", default="", help="v5p:4x4x4, or v5p-128 as clouds say; default: this machine")
    plan.add_argument(
        "--slices", type=int, default=1, help="so many of them, joined by the slower network (default: 1)"
    )
    plan.add_argument(
        "--mesh", action="append", help="axes that differ from size 1, such as data=-1,fsdp=4; again for a comparison"
    )
    plan.add_argument("--json", help="a file for all numbers; docs/experts.md tells its keys")
    parsed, rest = parser.parse_known_args(arguments)
    flags = [f"--{name}" for name in vars(parsed) if name != "command"]
    for argument in rest:
        if not argument.startswith("--config.") or "=" not in argument:
            given = argument.partition("=")[0]
            close = difflib.get_close_matches(given, flags, n=1)
            others = [
                name for name, one in commands.choices.items() if given in re.findall(r"--[\w-]+", one.format_usage())
            ]
            hint = "options of the config are written --config.a.b=value"
            if given.startswith("--") and others:
                hint = f"moon-jax {others[0]} has this flag"
            elif close:
                hint = f"the closest flag is {close[0]}"
            raise UserError(f"{argument}: not understood; {hint}")
    return parsed, rest


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, also after a stop by SIGTERM (STOP_CODE); MISTAKE after a mistake of the user's or a refusal of the system's
        (disk, permissions); AGAIN where another process, a disk or a bucket did not answer; 130 after Ctrl-C.
    """
    with interrupt.remembered():
        return _main(arguments)


def _main(arguments: list[str] | None) -> int:
    try:
        parsed, overrides = parse(arguments)
        COMMANDS[parsed.command](parsed, overrides)
    except UserError as error:
        return _fail(str(error), AGAIN if isinstance(error, config_lib.Unavailable) else MISTAKE, error.shared)
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        return _fail(_refused(error, parsed), MISTAKE)
    except RuntimeError as error:
        # Several processes compute as one: what the others do not give ends as an error of XLA's.
        if not interrupt.RELAY.is_set() or type(error).__name__ != "JaxRuntimeError" or not LOST.search(str(error)):
            raise
        why = str(error).splitlines()[0][:200]
        told = f"another process was lost ({why}); start all again: the run goes on from its newest checkpoint"
        return _fail(told, AGAIN)
    except KeyboardInterrupt:
        if interrupt.TERMINATED.is_set():
            return _fail("stopped by SIGTERM; the same command goes on from here", _stop_code(), shared=True)
        anew = parsed.command in ("export", "plan")
        goes_on = "nothing was written; the same command starts anew" if anew else "the same command goes on from here"
        return _fail(f"interrupted; {goes_on}", 130)
    return 0


MISTAKE = 2
"""The exit code where a person must mend something."""

AGAIN = 1
"""The exit code where the same command may go well later."""

STOP_CODE = "MOON_JAX_STOP_CODE"
"""An environment variable: the exit code after a stop by SIGTERM, 0 by default. A launcher, which must tell a run that
was stopped from one that is done, sets it.
"""

LOST = re.compile(
    "gloo|nccl|peer|connection|heartbeat|coordination|barrier|UNAVAILABLE|DEADLINE_EXCEEDED", re.IGNORECASE
)
"""What XLA says of other processes; it says other things of this one, such as that memory is short."""


def _stop_code() -> int:
    text = os.environ.get(STOP_CODE, "")
    return int(text) if text.isdigit() and int(text) < 256 else 0


def _fail(message: str, code: int, shared: bool = False) -> int:
    """Tells it in one line, but what is `shared` in one process only; gives the exit code."""
    if shared and interrupt.RELAY.is_set():
        from moon_jax import hosts

        if not hosts.first():
            return code
    print(f"moon-jax: {config_lib.printable(' '.join(message.split()))}", file=sys.stderr)
    return code


ROOM = "make room, then give the same command again"
PERMISSION = "ask for permission, or give another place"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ROOM,
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "give a place that can be written",
    errno.EIO: "the disk does not answer; give another place",
}
"""What the system refuses for the user to mend. Any other OSError is a bug of ours, and shows its stack."""


def _refused(error: OSError, parsed: argparse.Namespace) -> str:
    # What fails in the middle of a file does not say which: it is ours, where we write.
    flag = {"export": "output", "plan": "json"}.get(parsed.command, "workdir")
    place = error.filename or f"--{flag} {getattr(parsed, flag)}"
    return f"{place}: {os.strerror(error.errno)}; {REMEDIES[error.errno]}"


def _hush() -> None:
    """What Orbax, its tasks and gcsfs log as an error comes to us as an exception, and is told in one line."""
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _but_of_closed_loops


def _but_of_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
    """TensorStore's threads still report to Orbax when that has given a damaged checkpoint, or a full disk, up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _configured(parsed: argparse.Namespace, overrides: list[str], name: str, init: str = "") -> config_lib.Config:
    """The config of a run: the defaults, what the model to begin from decides, the config's differences, the flags."""
    for flag in ("data", "workdir"):
        if getattr(parsed, flag) == "":
            raise UserError(f"--{flag}: empty; give a path, or leave the flag out")
        given = getattr(parsed, flag) or ""
        if places.is_address(given) and (flag == "data" or parsed.command == "quickstart"):
            hint = "; moon-jax train takes gs://" if flag == "workdir" else ""
            raise UserError(f"--{flag} {given}: not a folder of this machine; mount it, and give that path{hint}")
    if parsed.steps is not None and parsed.steps < 1:
        raise UserError(f"--steps {parsed.steps}: give 1 or more")
    base = {}
    if init:
        base = _begun(init, parsed.workdir)
    config = config_lib.load(name, base)
    given = {"data.path": parsed.data, "training.steps": parsed.steps, "training.init": init}
    config = config_lib.replace(config, {name: value for name, value in given.items() if value})
    return config_lib.override(config, overrides)


def _begun(init: str, workdir: str) -> dict[str, object]:
    """The options that the model to begin from decides. A run that goes on asks its own config, and needs no folder."""
    from moon_jax.hub import folder

    place = places.Place(workdir)
    place.pull(["config.json"])
    own = place.files / "config.json"
    if own.is_file() and config_lib.read_json(own).training.init == init:
        return folder.of_run(own)
    run = folder.run_at(init)
    if run:
        return folder.of_run(run.files / "config.json")
    return folder.settings(folder.locate(init))


def run_train(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, and nothing else."""
    init = parsed.init or ""
    init = init if places.is_address(init) or not init else str(Path(init))
    config = _configured(parsed, overrides, parsed.config, init)
    from moon_jax import hosts
    from moon_jax.evaluation import training
    from moon_jax.training import watch

    interrupt.check()
    _hush()
    workdir = parsed.workdir
    watching = watch.Watching(parsed.profile and watch.parse_profile(parsed.profile), parsed.stall_minutes)
    hosts.start()
    training.train(config, workdir, watching)
    served = f"{Path(workdir).name if places.is_address(workdir) else workdir}-served"
    export = shlex.join(["moon-jax", "export", "--model", workdir, "--output", served])
    watch.Watch().line(f"the model is in {workdir}; to serve it: {export}")


def run_export(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Writes the folder; with --verify holds it against transformers."""
    if overrides:
        raise UserError(f"{overrides[0]}: a model is exported as it was trained; leave this out")
    output = Path(parsed.output).resolve()
    from moon_jax.hub import export
    from moon_jax.serving import embedder
    from moon_jax.training import watch

    export.refuse_taken(output)
    interrupt.check()
    _hush()
    report = watch.Watch()
    trained = embedder.read(parsed.model, track=functools.partial(report.track, "loading"))
    if parsed.dtype:
        trained = embedder.cast(trained, parsed.dtype)
    if parsed.verify:
        from moon_jax.evaluation import verify

        with report.busy("embedding a text, an image and both"):
            asked, ours = verify.ours(trained)
    export.export(trained, output, functools.partial(report.track, "writing"))
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    report.line(f"{output}: {size / 1e6:,.1f} MB")
    if parsed.verify:
        del trained
        with report.busy("embedding them with transformers"):
            cosines = (ours * verify.theirs(output, asked)).sum(axis=1)
        told = ", ".join(
            f"{name} {cosine:.7f}" for name, cosine in zip(("text", "image", "both"), cosines, strict=True)
        )
        report.line(f"cosines of our embeddings and transformers': {told}")
        verify.check(cosines)


def run_plan(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Compiles one layout after the other, and shows them side by side."""
    config = config_lib.override(config_lib.load(parsed.config), overrides)
    layouts = [config_lib.replace(config, _axes(mesh)) for mesh in parsed.mesh or ()] or [config]
    if parsed.slices < 1 or (parsed.slices > 1 and not parsed.topology):
        raise UserError(f"--slices {parsed.slices}: give 1 or more, and --topology for what each is")
    if parsed.json and not Path(parsed.json).parent.is_dir():
        raise UserError(f"--json {parsed.json}: there is no folder {Path(parsed.json).parent}; make it first")
    if parsed.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles; it shall not look for a TPU
    from moon_jax.training import plan, watch

    report = watch.Watch()
    for one in layouts:  # all mistakes before the first compilation
        plan.check(one, parsed.topology, parsed.slices)
    plans, refused = [], []
    for one in layouts:
        try:
            plans.append(plan.plan(one, parsed.config, parsed.topology, parsed.slices, report.busy))
        except UserError as error:  # of one layout that does not fit a chip; the others are told all the same
            refused.append(error)
    if not plans:
        raise refused[0]
    report.console.print(plan.table(plans))
    for error in refused:
        report.line(str(error))
    if parsed.json:
        text = json.dumps([plan.to_json(one) for one in plans], indent=2) + "\n"
        Path(parsed.json).write_text(text, encoding="utf-8")


def _axes(mesh: str) -> dict[str, object]:
    """Options of the mesh from data=-1,fsdp=4; the axes that are not named are 1."""
    axes = {f"mesh.{axis}": 1 for axis in ("data", "fsdp", "expert", "tensor")}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        if f"mesh.{axis}" not in axes or not re.fullmatch(r"-?\d+", size):
            raise UserError(
                f"--mesh {mesh}: {part} is not understood; write data=-1,fsdp=4,expert=4,tensor=1 or part of it"
            )
        axes[f"mesh.{axis}"] = int(size)
    return axes


def run_quickstart(parsed: argparse.Namespace, overrides: list[str]) -> None:
    """Trains, judges, embeds; training is skipped or resumed where its result stands already."""
    config = _configured(parsed, overrides, parsed.config or "quickstart")
    workdir = Path(parsed.workdir)

    # Importing JAX takes seconds; mistakes on the command line are told before.
    from moon_jax.evaluation import report as report_lib
    from moon_jax.evaluation import training
    from moon_jax.serving import embedder as serving
    from moon_jax.training import watch

    interrupt.check()
    _hush()
    began = time.monotonic()
    prepared = training.train(config, workdir)
    report = watch.Watch(workdir)
    metrics = report_lib.evaluate(serving.load(workdir), prepared, workdir, report)
    for table in report_lib.tables(metrics):
        report.console.print(table)
    given = {"--data": parsed.data, "--steps": parsed.steps, "--config": parsed.config}
    words = [str(word) for flag, value in given.items() if value for word in (flag, value)]
    again = ["moon-jax", "quickstart", *words, *overrides]
    for heading, lines in report_lib.last_screen(metrics, workdir, prepared, again):
        report.heading(heading)
        for line in lines:
            report.line(line)
    report.line(f"done in {time.monotonic() - began:.0f} s")


COMMANDS = {"quickstart": run_quickstart, "plan": run_plan, "train": run_train, "export": run_export}


def console() -> None:
    """What the shell calls."""
    _ask_for_huge_pages()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Threads of libraries may still work on what failed: they are not waited for, nor what they say at the end.
        places.remove_copies()
        os._exit(code)


def _ask_for_huge_pages() -> None:
    """Restarts this process once with glibc's huge pages on.

    XLA's CPU client maps its buffers anew in every step; with small pages, faulting them in takes a third of the time
    of the quickstart's step. glibc reads the setting only when a process starts. Results do not depend on it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    console()

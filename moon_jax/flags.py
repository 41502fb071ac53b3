"""What the command line takes: commands, flags, and the help that shows them."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from moon_jax.augment.options import Options
from moon_jax.config import UserError

DESCRIPTION = """\
MOON2.0 in JAX: one model embeds a product from its text, its image or both into one space.

examples:
  moon-jax quickstart                                              the whole method on a rendered catalogue
  moon-jax quickstart --data catalogue/ --workdir runs/first       on your own
  moon-jax prepare --data catalogue/ --output prepared             any catalogue or log, into records
  moon-jax augment --data prepared --output augmented              enriched titles and expanded images beside them
  moon-jax train --config moon2_qwen3vl_2b --init hf://Qwen/Qwen3-VL-2B-Instruct --data catalogue/ --workdir runs/2b
  moon-jax export --model runs/2b --output served --verify
  moon-jax evaluate --model runs/2b --data prepared --output judged  and compare it with others
  moon-jax embed --model runs/2b --data prepared --output vectors
  moon-jax search --index vectors --model runs/2b --text 'red shoe'
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

PREPARE = """\
Turns a catalogue, with or without a log of what was clicked, into prepared data: sharded records, triplets as indices,
a split, a manifest, and a quarantine of what cannot be used. --data is a file or a folder of Parquet, JSONL, CSV, TSV
or tar (webdataset) files, what Hugging Face's datasets saved, hf://datasets/owner/name, or tfds://name. docs/data.md
tells what a file holds. The same command again goes on where it stopped.

examples:
  moon-jax prepare --data catalogue/ --output prepared
  moon-jax prepare --data mbe.jsonl --columns mbe --fetch img.alicdn.com --output prepared
  moon-jax prepare --data fashion200k/ --columns fashion200k --output prepared --config.prepare.longest_side=512
  moon-jax prepare --data products.csv --columns mine.json --output prepared
  moon-jax train --config quickstart --data prepared --workdir runs/first

Nothing is fetched but from hosts that --fetch names (*.example.com takes its subdomains), never from addresses of a
private network, and hf:// from the hub.
"""

AUGMENT = """\
Adds enriched titles and expanded images to the products that a run trains on: by rules and OpenCV, or by models. Titles
come from any server of OpenAI's protocol (vLLM, SGLang, transformers serve), images from an editing pipeline of
diffusers, such as Qwen-Image-Edit. What disagrees with its product is dropped, if --model names an embedder: a run of
ours, CLIP or SigLIP. Where each result came from stands in augmented.parquet, some are shown in augmented.png. What is
evaluated is left as it was. The same command again goes on where it stopped.

examples:
  moon-jax augment --data prepared --output augmented
  moon-jax augment --data prepared --output augmented --model runs/first
  moon-jax augment --data prepared --output augmented --text http://localhost:8000/v1 --text-model Qwen3-VL-8B-Instruct
  moon-jax augment --data prepared --output augmented --images hf://Qwen/Qwen-Image-Edit-2509 --model models/clip
  moon-jax augment --data prepared --output augmented --beam runner=FlinkRunner --beam flink_master=HOST:8081
  moon-jax train --config quickstart --data augmented --workdir runs/more --config.data.augmented=drawn

Nothing asks the network but a server that --text names, and hf:// the hub. A server's key is read from OPENAI_API_KEY.
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


EVALUATE = """\
Judges a model on the products of a catalogue that are kept for it: retrieval in all directions of text, image and both,
categories and attributes by label texts, by neighbours and by a linear probe. --model is a workdir, a Hugging Face
folder of ours, Qwen3-VL, Qwen3-VL-Embedding, CLIP, SigLIP, SigLIP 2 or sentence-transformers, or bm25 or colours, what
any model has to beat; --vectors judges vectors from anywhere. docs/evaluation.md tells what is measured, and how.

examples:
  moon-jax evaluate --model runs/first --data prepared --output judged/first
  moon-jax evaluate --model models/siglip2 --data catalogue/ --output judged/siglip2
  moon-jax evaluate --model runs/first --data prepared --output judged/first --compare bm25
  moon-jax evaluate --model runs/first --data prepared --output judged/first --compare judged/siglip2
  moon-jax evaluate --vectors vectors/ --data prepared --output judged/theirs
  moon-jax evaluate --model runs/first --data prepared --output judged/log --queries queries.jsonl --qrels qrels.tsv
  moon-jax evaluate --model models/clip --data prepared --output judged/clip --prompt 'a photo of {}' --prompt '{}'
"""


EMBED = """\
Embeds every product of prepared data into Parquet files with the columns id, view and vector; manifest.json says of
which model, view, width and template they are. The same command again goes on where it stopped,
and gives the same files.

examples:
  moon-jax embed --model runs/first --data prepared --output vectors
  moon-jax embed --model runs/2b --data prepared --output vectors --views t,i,mm --dtype float16
  moon-jax embed --model runs/nested --data prepared --output vectors --width 64 --dtype int8
"""

SEARCH = """\
Finds the products most like a text, an image or both, exactly: every vector is compared. Vectors of another model than
--model are refused. --faiss writes a FAISS index of the same vectors, for servers built on it.

examples:
  moon-jax search --index vectors --model runs/first --text 'red canvas sneaker'
  moon-jax search --index vectors --model runs/first --image shoe.jpg -k 5
  moon-jax search --index vectors --model runs/first --text 'in blue' --image shoe.jpg
  moon-jax search --index vectors --faiss vectors.faiss
"""


HEATMAP = """\
Draws where a model of ours looks: the attention that its layers give to an item's image patches and title tokens, over
the picture and behind the words; beside it an .npz with all layers and heads. A second model is drawn at the side of
the first. --shares shows what each token adds to the similarity of a query and an item in its place.

examples:
  moon-jax heatmap --model runs/first --text 'high quality red mug' --image mug.jpg --output mug.png
  moon-jax heatmap --model runs/first --compare runs/base --text 'red mug' --image mug.jpg --output both.png --layer 2
  moon-jax heatmap --model runs/first --text 'red mug' --item-image mug.jpg --output pair.png --shares
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
    quickstart.add_argument("--data", help="prepared data, or a file or folder of products; default: rendered ones")
    quickstart.add_argument(
        "--workdir", default="moon-jax-quickstart", help="where the run lives (default: %(default)s)"
    )
    quickstart.add_argument("--steps", type=int, help="training steps, in place of the config's")
    quickstart.add_argument("--config", help="a config that is shipped (quickstart, the default), or a file")
    train = commands.add_parser(
        "train", help="train a config, from public weights or from scratch", description=TRAIN, **layout
    )
    train.add_argument("--config", required=True, help="a config that is shipped, or a file")
    train.add_argument("--data", help="prepared data, or a file or folder of products; default: rendered ones")
    train.add_argument("--workdir", required=True, help="where the run lives: a folder, or gs://bucket/folder")
    train.add_argument(
        "--init", help="a workdir, a Hugging Face folder or hf://owner/name to begin from; default: random weights"
    )
    train.add_argument("--steps", type=int, help="training steps, in place of the config's")
    train.add_argument("--profile", metavar="FIRST:LAST", help="a profiler trace of these steps, counted from 1")
    train.add_argument(
        "--stall-minutes", type=float, default=10.0, help="without a step for so long, show all stacks (default: 10)"
    )
    prepare = commands.add_parser(
        "prepare", help="turn a catalogue or a log into records to train on", description=PREPARE, **layout
    )
    prepare.add_argument("--data", required=True, help="a file, a folder, hf://datasets/owner/name or tfds://name")
    prepare.add_argument("--output", required=True, help="a folder that is new, empty, or half prepared")
    prepare.add_argument("--columns", default="own", help="a column map: own (default), mbe, mbe2, … or a .json file")
    prepare.add_argument("--fetch", action="append", default=[], metavar="HOST", help="ask this host for images by URL")
    prepare.add_argument("--processes", type=int, help="that work at a time (default: one for each core)")
    augment = commands.add_parser(
        "augment", help="add enriched titles and expanded images to prepared data", description=AUGMENT, **layout
    )
    augment.add_argument("--data", required=True, help="prepared data")
    augment.add_argument("--output", required=True, help="a folder that is new, empty, or half done")
    augment.add_argument("--text", default=Options.text, help="rules (default), none, or the URL of a server")
    augment.add_argument("--text-model", default=Options.text_model, help="the model that is asked there")
    augment.add_argument(
        "--images", default=Options.images, help="classical (default), none, or a diffusers pipeline: folder or hf://"
    )
    augment.add_argument(
        "--image-steps", type=int, default=Options.image_steps, help="its steps of denoising; default: its own number"
    )
    augment.add_argument(
        "--expansions", type=int, default=Options.expansions, help="images of a product, n_c (default: %(default)s)"
    )
    augment.add_argument(
        "--model", default=Options.model, help="the embedder of the filter: a workdir, a folder or hf://; default: none"
    )
    augment.add_argument(
        "--quantile",
        type=float,
        default=Options.quantile,
        help="share of the results that the filter drops (default: %(default)s)",
    )
    augment.add_argument("--seed", type=int, default=Options.seed, help="of what is drawn (default: %(default)s)")
    augment.add_argument("--processes", type=int, help="that work at a time (default: one for each core)")
    augment.add_argument("--connections", type=int, default=16, help="requests to the server at a time (default: 16)")
    augment.add_argument(
        "--beam", action="append", metavar="OPTION=VALUE", help="run on Apache Beam, with this option of its own"
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
    evaluate = commands.add_parser("evaluate", help="judge a model, of any kind", description=EVALUATE, **layout)
    evaluate.add_argument("--model", default="", help="a workdir, a Hugging Face folder, hf://…, bm25 or colours")
    evaluate.add_argument("--vectors", default="", help="in its place, Parquet files with id, view and vector")
    evaluate.add_argument("--data", required=True, help="prepared data, or a file or folder of products")
    evaluate.add_argument("--output", required=True, help="a folder for scores, pictures and vectors")
    evaluate.add_argument("--compare", default="", help="another model, or the output of its evaluation")
    evaluate.add_argument("--queries", default="", metavar="FILE", help="your own queries, to be asked alone")
    evaluate.add_argument("--qrels", default="", metavar="FILE", help="what answers them, and how well")
    evaluate.add_argument("--columns", default="own", help="a column map of these two: own (default), beir or a file")
    evaluate.add_argument(
        "--known", type=int, default=2000, help="products whose labels neighbours and probe know (default: %(default)s)"
    )
    evaluate.add_argument("--prompt", action="append", help="how a label is put to the model; {} is the label")
    embed = commands.add_parser("embed", help="embed a catalogue", description=EMBED, **layout)
    embed.add_argument("--model", required=True, help="a workdir, a Hugging Face folder or hf://owner/name")
    embed.add_argument("--data", required=True, help="prepared data")
    embed.add_argument("--output", required=True, help="a folder that is new, empty, or half embedded")
    embed.add_argument(
        "--views", default="product", help="t, i, mm, or some: t,mm; default: product, each by all that it has"
    )
    embed.add_argument("--dtype", default="float32", help="float32 (default), float16 or int8")
    embed.add_argument("--width", type=int, default=0, help="keep the first so many dimensions (Matryoshka)")
    search = commands.add_parser("search", help="find products by text, image or both", description=SEARCH, **layout)
    search.add_argument("--index", required=True, help="what embed wrote")
    search.add_argument("--model", default="", help="the model that embedded it")
    search.add_argument("--text", default="", help="what is asked for")
    search.add_argument("--image", default="", help="a picture of it")
    search.add_argument("-k", type=int, default=10, help="how many are shown (default: 10)")
    search.add_argument("--view", default="", help="t, i or mm, where the index holds several of a product")
    search.add_argument("--faiss", default="", metavar="FILE", help="write a FAISS index there")
    heatmap = commands.add_parser("heatmap", help="see where a model looks", description=HEATMAP, **layout)
    heatmap.add_argument("--model", required=True, help="a workdir, a Hugging Face folder or hf://owner/name, of ours")
    heatmap.add_argument("--compare", default="", help="another one, at its side")
    heatmap.add_argument("--text", default="", help="of the query, or of the product")
    heatmap.add_argument("--image", default="", help="its picture")
    heatmap.add_argument("--item-text", default="", help="of an item that it is compared with")
    heatmap.add_argument("--item-image", default="", help="its picture")
    heatmap.add_argument("--layer", type=int, help="from 0; default: the mean over all")
    heatmap.add_argument("--head", type=int, help="from 0; default: the mean over all")
    heatmap.add_argument("--shares", action="store_true", help="what each token adds to the pair's similarity")
    heatmap.add_argument("--output", required=True, help="a .png; the arrays go beside it")
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

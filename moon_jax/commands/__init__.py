"""What each command does: reads its flags, calls the part that does the work, and tells what came of it."""

from moon_jax.commands import judging, making

COMMANDS = {
    "quickstart": making.run_quickstart,
    "prepare": making.run_prepare,
    "augment": making.run_augment,
    "train": making.run_train,
    "export": making.run_export,
    "plan": making.run_plan,
    "evaluate": judging.run_evaluate,
    "embed": judging.run_embed,
    "search": judging.run_search,
    "heatmap": judging.run_heatmap,
}

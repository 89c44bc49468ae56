"""From factors back to dense weights: a checkpoint that the stock class alone loads, where nothing else is gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from hfprune.checkpoint.files import side_folder
from hfprune.checkpoint.load import from_pretrained
from hfprune.checkpoint.metadata import block_of, plan_of, read_block, with_format
from hfprune.checkpoint.save import save_pretrained
from hfprune.lowrank.factor import factored_layers, merged, put
from hfprune.structure.plan import Plan


def merge(model: nn.Module) -> int:
    """Replaces every factored layer of a model by the dense one whose weight is the product, in place.

    The model answers as before, to rounding, and has as many parameters as one that was never factored. What its config
    says follows: where nothing else is gone, it is saved as a stock checkpoint.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("factored")  # after `import hfprune`
        >>> hfprune.merge(model)
        >>> model.save_pretrained("dense")                            # loads in stock transformers

    Returns:
        How many layers were merged.
    """
    layers = factored_layers(model)
    plan, block = plan_of(model), block_of(model)
    for layer in layers.values():
        put(model, layer, merged(layer))
    if not layers or plan is None:
        return len(layers)
    plan = replace(plan, factored={})
    factors = tuple(f"{path}.factor_" for path in layers)
    block["sparsity"] = {name: record for name, record in block["sparsity"].items() if not name.startswith(factors)}
    block["plan"] = plan.to_dict()
    if plan == Plan(dense_config=plan.dense_config):
        del block["plan"]
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            del model.config.quantization_config
    block["format_version"] = with_format(block)["format_version"]
    if "plan" in block:
        from hfprune.checkpoint.uniform import choose_route

        choose_route(model)
    return len(layers)


def merge_folder(folder: str | Path, output: str | Path) -> Path:
    """Writes a factored checkpoint of a transformers or timm model anew, with dense weights in the place of factors.

    Args:
        folder: the checkpoint.
        output: made where it is missing; another folder than `folder`. A tokenizer and the like are copied.

    Raises:
        CheckpointError: the folder is not such a checkpoint, or the files could not be written.
    """
    folder, output = Path(folder), Path(output)
    model = from_pretrained(folder)
    merge(model)
    with side_folder(output) as side:
        save_pretrained(model, side)
        _copy_others(folder, side)
    return output


def is_factored(folder: str | Path) -> bool:
    """Whether a checkpoint holds factored layers."""
    block = read_block(folder) or {}
    return bool((block.get("plan") or {}).get("factored"))


def _copy_others(folder: Path, side: Path) -> None:
    """What belongs to the model beside its weights and config; its card and report speak of the factored one."""
    for path in folder.iterdir():
        known = path.name.startswith(_KEPT) and path.suffix in (".json", ".txt", ".model", ".jinja")
        if known and not (side / path.name).exists():
            (side / path.name).write_bytes(path.read_bytes())


_KEPT = ("token", "vocab", "merges", "special_tokens", "added_tokens", "preprocessor", "processor", "chat_template",
         "generation", "spiece", "sentencepiece")  # fmt: skip

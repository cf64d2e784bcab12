"""Run a transformers Llama, Mistral or Qwen2 beyond its training context, and ask about a file.

    python -m extras.hf --ckpt DIR --method lampe --file report.txt --question "Who signed it?"

In Python, `extend` applies a method to a model, and `restore` undoes it:

    model = AutoModelForCausalLM.from_pretrained(DIR)
    extend(model, lampe(length=100_000, mapping_len=6144, s1=1024, s2=256))
    model.generate(tokens, max_new_tokens=50)

transformers keeps all that is not about positions: generation, chat templates, streaming, quantized
weights, device_map. Its rotary embedding becomes the identity, so that its cache holds unrotated
keys, and its attention becomes rope_extrap.attend, which rotates and attends as the method says.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from load_llama import hugging_face_config
from needle import (
    METHODS,
    all_are_key,
    check_device,
    choose_all,
    errors_in_one_sentence,
    header_lines,
    read_text,
    settings,
)
from rope_extrap import Method, attend, contribution, key_dimensions

try:
    import transformers
    from transformers.masking_utils import causal_mask_function
except ImportError:
    print("extras.hf needs transformers 5: pip install transformers", file=sys.stderr)
    sys.exit(2)

# -------------------------------------------------------------------------------------------------
# Any transformers model


def extend(model, method: Method | list[Method]):
    """Apply a Method, or one Method per layer, to a transformers model, and return the model.

    It is changed in place; a second call replaces the first. The model's own frequencies are kept.
    Raises ValueError if the family, its rotary embedding or its attention is not supported.
    """
    if type(model).__name__ not in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
        raise ValueError(f"{type(model).__name__} is not supported, only Llama, Mistral and Qwen2")
    restore(model)
    rotary = model.get_decoder().rotary_emb
    layers = model.get_decoder().layers
    methods = method if isinstance(method, list) else [method] * len(layers)
    if len(methods) != len(layers):
        raise ValueError(f"{len(layers)} layers need one Method each, not {len(methods)}")
    if rotary.rope_type in ("dynamic", "longrope") or rotary.attention_scaling != 1:
        raise ValueError(f"rope_type {rotary.rope_type} is not supported, since it changes with "
                         f"the length or scales the attention")
    if any(kind != "full_attention" for kind in layer_types(model.config)):
        raise ValueError("sliding-window attention is not supported")
    for layer, of_layer in zip(layers, methods, strict=True):
        attention = layer.self_attn
        attention.extension = (cut_to_rank(of_layer, attention), rotary.inv_freq)
    model.plain_transformers = (rotary, model.config._attn_implementation)
    model.get_decoder().rotary_emb = NoRotation()
    model.set_attn_implementation("rope_extrap")
    return model


def restore(model):
    """Undo extend, and return the model. A model that was not extended stays as it is."""
    if hasattr(model, "plain_transformers"):
        rotary, implementation = model.plain_transformers
        del model.plain_transformers
        model.get_decoder().rotary_emb = rotary
        model.set_attn_implementation(implementation)
    return model


def layer_types(config) -> list[str]:
    """The kind of attention in each layer."""
    sliding = getattr(config, "sliding_window", None) is not None
    default = "sliding_attention" if sliding else "full_attention"
    return getattr(config, "layer_types", None) or [default]


def cut_to_rank(method: Method, attention: nn.Module) -> Method:
    """The method with the key dimensions of the heads on this tensor-parallel rank."""
    heads = attention.q_proj.weight
    if method.key_dims is None or not hasattr(heads, "to_local"):
        return method
    mesh = heads.device_mesh
    own = method.key_dims.chunk(mesh.size())[mesh.get_local_rank()]
    return replace(method, key_dims=own)


class NoRotation(nn.Module):
    """A rotary embedding that leaves queries and keys as they are: cos is 1, and sin is 0."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None,
              position_ids: Tensor | None = None, **kwargs) -> tuple[Tensor, None]:
    """What transformers calls in each layer. q (B, heads, T, D), k and v (B, kv_heads, S, D).

    Raises ValueError for what would change the meaning of positions.
    """
    method, frequencies = module.extension
    T = q.shape[2]
    S = k.shape[2]
    if attention_mask is not None:
        raise ValueError("only causal attention is supported, not a custom mask")
    if torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("gradients are not supported; use torch.no_grad()")
    if position_ids is not None and module.layer_idx == 0:
        expected = torch.arange(S - T, S, device=position_ids.device)
        if not (position_ids == expected).all():
            raise ValueError("positions must be consecutive and continue the cache; padded or "
                             "packed batches, static caches and sliding caches are not supported")
    out = attend(side_by_side(q), side_by_side(k), v, method, frequencies)
    return out.transpose(1, 2), None


def side_by_side(x: Tensor) -> Tensor:
    """Reorder coordinates f and f + D/2, which transformers rotates together, to 2f and 2f + 1."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def mask(attention_mask: Tensor | None = None, mask_function=causal_mask_function,
         **kwargs) -> None:
    """What transformers calls once for each forward pass to make the mask: none is needed."""
    padded = attention_mask is not None and not attention_mask.all()
    if padded or mask_function is not causal_mask_function:
        raise ValueError("only causal attention is supported, not padded or packed batches")


transformers.AttentionInterface.register("rope_extrap", attention)
transformers.AttentionMaskInterface.register("rope_extrap", mask)


@torch.no_grad()
def measure_contributions(model, text: Tensor) -> list[Tensor]:
    """DPE, step (b), as model.measure_contributions, on a plain transformers model and one text.

    text is int64 (1, T). Returns each layer's contributions, float32 (n_heads, D/2).
    """
    found = []

    def record(attention, arguments, kwargs):
        x = kwargs["hidden_states"]  # (1, T, dim), normalized
        q = attention.q_proj(x)[0].unflatten(-1, (-1, attention.head_dim))  # (T, heads, D)
        k = attention.k_proj(x)[0].unflatten(-1, (-1, attention.head_dim))  # (T, kv_heads, D)
        found.append(contribution(side_by_side(q), side_by_side(k)))

    layers = model.get_decoder().layers
    hooks = [layer.self_attn.register_forward_pre_hook(record, with_kwargs=True)
             for layer in layers]
    model(text, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


# -------------------------------------------------------------------------------------------------
# A question about a file


def make_prompt(tokenizer, document: str, question: str, plain: bool) -> Tensor:
    """The tokens (1, l) of the document, then the question, in the model's chat template.

    If plain, they are the text alone, without a template. Otherwise raises ValueError if the
    tokenizer has no template.
    """
    if plain:
        return tokenizer(f"{document} {question}", return_tensors="pt").input_ids
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; use --plain")
    messages = [dict(role="user", content=f"{document}\n\n{question}")]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                         return_dict=True).input_ids


def methods_for(args: argparse.Namespace, model, prompt: Tensor) -> list[Method]:
    """The method of --method with its settings for this prompt (1, l), one per layer.

    Prints the settings. Key dimensions are those of the first 8,192 tokens of the prompt, or of as
    many as the model was trained on.
    """
    l = prompt.shape[1]
    config = hugging_face_config(Path(args.ckpt) / "config.json")
    if args.train_len is not None:
        config = replace(config, train_len=args.train_len)
    args.lengths = [l]
    chosen = choose_all(args, config)
    for line in header_lines(chosen, config):
        print(line, file=sys.stderr)
    own, _, method = chosen[l][args.method]
    if all_are_key(own, config):
        return [method] * config.n_layers

    contributions = measure_contributions(model, prompt[:, :min(config.train_len, 8192)])
    return [replace(method, key_dims=key_dimensions(x, own["topk"])) for x in contributions]


def refuse_nan(ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor. Raises ValueError if logits are not finite."""
    if not logits.isfinite().all():
        raise ValueError("logits are not finite; use --dtype bfloat16 or float32")
    return logits


def answer(args: argparse.Namespace) -> None:
    """Print the answer as it is generated."""
    if args.max_new < 1:
        raise ValueError("--max-new must be at least 1")
    check_device(args.device)
    document = sys.stdin.read() if args.file == "-" else read_text(args.file)
    if not (Path(args.ckpt) / "config.json").is_file():
        raise ValueError(f"{args.ckpt} is not a directory with a checkpoint")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.ckpt)
    prompt = make_prompt(tokenizer, document, args.question, args.plain)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.ckpt, dtype=args.dtype)
    model = model.to(args.device).eval()
    prompt = prompt.to(args.device)
    l = prompt.shape[1]
    extend(model, methods_for(args, model, prompt))

    print(f"# reading {l} tokens", file=sys.stderr, flush=True)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                            max_new_tokens=args.max_new, logits_processor=[refuse_nan],
                            streamer=streamer)
    if not tokenizer.decode(tokens[0, l:], skip_special_tokens=True).strip():
        print("# the answer is empty", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", required=True, metavar="DIR", help="checkpoint directory")
    add("--file", required=True, help="the document, UTF-8 text; - reads standard input")
    add("--question", required=True, help="the question, which follows the document")
    add("--method", choices=METHODS, default="lampe", help="default: lampe")
    add("--set", type=settings, action="extend", default=[], metavar="NAME=VALUE,...",
        help="settings to override, as in needle.py")
    add("--train-len", type=int, metavar="N",
        help="training length in tokens (default: the checkpoint's)")
    add("--plain", action="store_true",
        help="for base models: the document, then the question, without a chat template")
    add("--max-new", type=int, default=200, metavar="N",
        help="longest answer, in tokens (default: 200)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ... (default: cuda if available)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="default: the checkpoint's")
    args = parser.parse_args()
    with errors_in_one_sentence(parser):
        answer(args)


if __name__ == "__main__":
    main()

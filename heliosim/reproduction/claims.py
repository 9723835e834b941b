"""The paper's claims that have to have rows: one entry per line of the project's table of reproduction targets."""

from __future__ import annotations

from collections.abc import Mapping

CLAIMS: Mapping[str, tuple[str, ...]] = {
    # memory, exact
    "weight memory saved, OPT-1.3B@6 / OPT-6.7B@9": ("weights-saved",),
    "weight memory CodeLlama-34B / Llama2-70B / HELIOS; saving": ("weights-large-pair",),
    "Llama2-7B / Llama3-8B / Llama2-13B weights": ("weights-llama-set",),
    "HBM share": ("hbm-shares",),
    # exits: two inputs, one result
    "tokens by exit, OPT-1.3B alone": ("exits-small-alone",),
    "tokens by exit, OPT-6.7B alone": ("exits-large-alone",),
    "tokens by exit, HELIOS": ("exits-helios",),
    # time: given the state shares, and simulated; both averages of throughput
    "TPOT": ("tpot", "tpot-simulated"),
    "throughput at batch 1": ("throughput", "throughput-per-request", "throughput-token-weighted"),
    "TTFT; objective TTFT": ("ttft",),
    # energy, quality, adapting
    "energy per prompt": ("energy",),
    "perplexity vs OPT-1.3B": ("perplexity",),
    "transitions in 1087 requests; profiling cost; LD exposed": ("transitions", "ld-exposed"),
    # batch size: a line each of model, two data sets each
    "batch size vs full model, Llama3-8B": ("batch-llama3-sharegpt", "batch-llama3-hellaswag"),
    "batch size, Llama2-70B": ("batch-llama2-sharegpt", "batch-llama2-hellaswag"),
    "largest batch gain": ("batch-largest",),
    # the pair of large models against vanilla decoding
    "large pair on ShareGPT vs vanilla: EE-LLM / HELIOS": ("large-pair",),
    # directions
    "TH sweep": ("th-sweep",),
    "RI sweep 50-250": ("ri-sweep",),
    "LD/SW ablation": ("ld-sw",),
    "quality against depth": ("quality-depth",),
}

"""The supported families, and those that are refused for a reason.

Every family here passes the laws of the tests on a tiny random model; the defaults of `Architecture` describe most.
"""

from __future__ import annotations

from .base import Architecture, register

PLAIN = """
    afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bart beam bert bert-generation biogpt bitnet
    blenderbot blenderbot-small camembert cohere cohere2 cohere2_moe ctrl cwm data2vec-text deepseek_v2 deepseek_v3
    dots1 electra ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma4_text
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt_neox granite granitemoe granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm3
    llama llama4_text longcat_flash marian mbart mellum minicpm3 minimax_m2 ministral ministral3 mistral mixtral
    modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt pegasus persimmon phi phi3 phimoe
    plbart qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next roberta roberta-prelayernorm
    roc_bert seed_oss smollm3 solar_open stablelm starcoder2 whisper xlm-roberta xlm-roberta-xl youtu
""".split()
LEARNED_POSITIONS = {"gpt2": "wpe", "gpt_bigcode": "wpe"}

ALIBI = "its ALiBi biases add to every score, which neither a linear state nor the sparse kernels can carry"
SOFTCAP = "it soft-caps the scores, which only softmax attention over all of them can do"
SINKS = "its softmax has learned sinks in the denominator"
INDEXER = "its layers choose keys by an indexer of their own"
NO_ATTENTION = "it has no softmax attention"
OWN_CACHE = "its layers need a cache of their own class"
LLAMA = "it is Llama under another config class; load it with LlamaConfig"
REFUSED = {
    "bloom": ALIBI,
    "mpt": ALIBI,
    "gemma2": SOFTCAP,
    "vaultgemma": SOFTCAP,
    "flint": SINKS,
    "gpt_oss": SINKS,
    "granite_swa": SINKS,
    "granitemoe_swa": SINKS,
    "mimo_v2_flash": SINKS,
    "axk2": INDEXER,
    "deepseek_v32": INDEXER,
    "deepseek_v4": INDEXER,
    "glm_moe_dsa": INDEXER,
    "hy_v4": INDEXER,
    "minimax_m3_vl_text": INDEXER,
    "diffllama": "it attends twice a layer and subtracts",
    "doge": "its attention mask depends on the values",
    "hrm_text": "it runs its layers more than once a token",
    "inkling_text": "it adds position biases to the scores",
    "inkling2_text": "it adds position biases to the scores",
    "inkling2_loop_text": "it adds position biases to the scores",
    "minimax": OWN_CACHE,
    "exaone": LLAMA,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "bigbird_pegasus": "its attention is not causal by itself",
    "falcon_mamba": NO_ATTENTION,
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "rwkv": NO_ATTENTION,
    "xlstm": NO_ATTENTION,
    "falcon_h1": "attention and a recurrent state share each layer's cache",
}

for _name in PLAIN:
    register(Architecture(_name))
for _name, _embedding in LEARNED_POSITIONS.items():
    register(Architecture(_name, position_embedding=_embedding))

"""nano as GGUF: weights, vocabulary, chat template and licence in one file that llama.cpp loads."""

from pathlib import Path

import gguf

from aiosd.nano.model import Nano
from aiosd.nano.template import CHAT_TEMPLATE
from aiosd.nano.tokenizer import CONTROL, IM_END, PRE_TOKENIZER, SPECIAL, Tokenizer, byte_to_char


def export(model: Nano, tokenizer: Tokenizer, path: Path) -> None:
    """Write the file: matrices as f16, norms as f32."""
    s = model.s
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("nano")
    w.add_description("A tool-using chat model of a few million parameters, trained from scratch for aiosd.")
    w.add_license("MIT")
    w.add_languages(["en"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    w.add_vocab_size(s.vocab)
    w.add_context_length(s.context)
    w.add_embedding_length(s.width)
    w.add_block_count(s.layers)
    w.add_feed_forward_length(s.hidden)
    w.add_head_count(s.heads)
    w.add_head_count_kv(s.kv_heads)
    w.add_rope_dimension_count(s.head)
    w.add_rope_freq_base(s.rope_base)
    w.add_layer_norm_rms_eps(s.eps)

    chars = byte_to_char()
    written = ["".join(chars[b] for b in token) for token in tokenizer.tokens]
    written[: len(SPECIAL)] = SPECIAL
    kinds = [gguf.TokenType.NORMAL] * len(written)
    for name, i in tokenizer.special.items():
        kinds[i] = gguf.TokenType.CONTROL if name in CONTROL else gguf.TokenType.USER_DEFINED
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(PRE_TOKENIZER)
    w.add_token_list(written)
    w.add_token_types(kinds)
    w.add_token_merges([" ".join("".join(chars[b] for b in part) for part in pair) for pair in tokenizer.merges])
    w.add_eos_token_id(tokenizer.special[IM_END])
    w.add_eot_token_id(tokenizer.special[IM_END])
    w.add_pad_token_id(0)
    w.add_add_bos_token(False)
    w.add_add_eos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)

    tensors = model.state_dict()
    del tensors["space"]
    tensors["token_embd.weight"] = model.embedding().detach()
    for name, p in tensors.items():
        array = p.float().numpy()
        w.add_tensor(name, array if p.dim() == 1 else array.astype("float16"))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()

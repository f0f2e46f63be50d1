"""Widths of fairseq's Transformers that do not fit each other: refused before a model is built, or runs."""

from fairseq_adaptive.errors import UsageError


def check_widths(cfg, sides) -> None:
    """
    Args:
        cfg: fairseq's configuration of a Transformer
        sides: ``encoder``, ``decoder`` or both

    Raises:
        UsageError: with what would be right
    """
    block = cfg.quant_noise.pq_block_size
    for side in sides:
        half = getattr(cfg, side)
        if half.embed_dim % half.attention_heads:
            raise UsageError(
                f"--{side}-embed-dim {half.embed_dim} cannot be divided among {half.attention_heads} heads: "
                f"choose another --{side}-attention-heads"
            )
        for name, width in (("embed-dim", half.embed_dim), ("ffn-embed-dim", half.ffn_embed_dim)):
            if cfg.quant_noise.pq > 0 and width % block:
                raise UsageError(
                    f"--quant-noise-pq needs widths that are multiples of --quant-noise-pq-block-size {block}: "
                    f"--{side}-{name} is {width}"
                )
    if len(sides) > 1 and cfg.cross_self_attention and cfg.encoder.embed_dim != cfg.decoder.embed_dim:
        raise UsageError(
            f"--cross-self-attention attends to both sides at once: --encoder-embed-dim {cfg.encoder.embed_dim} and "
            f"--decoder-embed-dim {cfg.decoder.embed_dim} must be equal"
        )


def check_tied(cfg, width: int) -> None:
    """
    Args:
        cfg: fairseq's configuration of a Transformer
        width: of the decoder's embeddings

    Raises:
        UsageError: where the output is to share embeddings of another width
    """
    output = cfg.decoder.output_dim
    if cfg.share_decoder_input_output_embed and cfg.adaptive_softmax_cutoff is None and output != width:
        raise UsageError(
            f"--decoder-output-dim {output} cannot share embeddings of width {width}: make them equal, or leave out "
            "--share-decoder-input-output-embed and --share-all-embeddings"
        )

# Signatures of csrc/module.c. Integers named *_at are addresses of contiguous tensors that the caller keeps alive.

def linear(matrix_at: int, x_at: int, num_rows: int, y_at: int, /) -> None: ...
def heads(
    matrix_at: int,
    num_heads: int,
    x_at: int,
    row_stride: int,
    head_stride: int,
    num_rows: int,
    y_at: int,
    /,
) -> None: ...
def grouped_ffn(
    experts_at: int,
    x_at: int,
    num_x_rows: int,
    slot_rows_at: int,
    slot_experts_at: int,
    place_of_at: int,
    num_places: int,
    num_slots: int,
    y_at: int,
    /,
) -> None: ...
def rms_norm(x_at: int, weight_at: int, y_at: int, num_rows: int, width: int, eps: float, /) -> None: ...
def add_rms_norm(
    x_at: int, y_at: int, weight_at: int, out_at: int, num_rows: int, width: int, eps: float, /
) -> None: ...
def sample(logits_at: int, draws_at: int, tokens_at: int, num_rows: int, vocab: int, /) -> None: ...
def score(
    logits_at: int,
    tokens_at: int,
    num_top_at: int,
    num_rows: int,
    vocab: int,
    most_top: int,
    logprobs_at: int,
    ranks_at: int,
    top_ids_at: int,
    top_logprobs_at: int,
    /,
) -> None: ...
def normed_linear(
    matrix_at: int,
    x_at: int,
    index_at: int,
    num_index: int,
    num_rows: int,
    weight_at: int,
    eps: float,
    y_at: int,
    /,
) -> None: ...
def sample_rows(
    matrix_at: int,
    x_at: int,
    index_at: int,
    num_index: int,
    num_rows: int,
    weight_at: int,
    eps: float,
    logits_at: int,
    draws_at: int,
    num_draws: int,
    tokens_at: int,
    /,
) -> None: ...
def rope(
    x_at: int,
    row_stride: int,
    head_stride: int,
    num_rows: int,
    num_heads: int,
    width: int,
    cos_at: int,
    sin_at: int,
    interleave: int,
    /,
) -> None: ...
def route(
    logits_at: int,
    bias_at: int,
    ids_at: int,
    weights_at: int,
    num_rows: int,
    num_experts: int,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    softmax: int,
    method: int,
    normalize: int,
    scale: float,
    /,
) -> None: ...
def gate(
    matrix_at: int,
    x_at: int,
    bias_at: int,
    ids_at: int,
    weights_at: int,
    counts_at: int,
    num_rows: int,
    /,
    *rule: int | float,
) -> None: ...
def plan_slots(
    ids_at: int,
    num_tokens: int,
    top_k: int,
    rank_of_at: int,
    num_experts: int,
    num_ranks: int,
    plan_at: int,
    counts_at: int,
    /,
) -> None: ...
def combine(
    rows_at: int,
    num_slots: int,
    slot_index_at: int,
    weights_at: int,
    base_at: int,
    y_at: int,
    num_rows: int,
    top_k: int,
    width: int,
    /,
) -> None: ...
def tree_add(part_addresses_at: int, num_parts: int, y_at: int, num_elements: int, /) -> None: ...
def attention(
    latent_at: int,
    rope_at: int,
    cache_at: int,
    tables_at: int,
    row_seq_at: int,
    positions_at: int,
    out_at: int,
    latent_row_stride: int,
    latent_head_stride: int,
    rope_row_stride: int,
    rope_head_stride: int,
    num_rows: int,
    num_heads: int,
    latent_width: int,
    rope_width: int,
    num_blocks: int,
    num_seqs: int,
    max_blocks: int,
    scale: float,
    /,
) -> None: ...
def expanded_attention(
    query_at: int,
    key_at: int,
    value_at: int,
    cache_at: int,
    tables_at: int,
    row_seq_at: int,
    positions_at: int,
    out_at: int,
    query_row_stride: int,
    query_head_stride: int,
    num_rows: int,
    num_heads: int,
    rope_width: int,
    num_blocks: int,
    num_seqs: int,
    max_blocks: int,
    scale: float,
    /,
) -> None: ...
def mla_project(weights_at: int, batch_at: int, first_row: int, num_rows: int, x_at: int, rows_at: int, /) -> None: ...
def mla_attend(
    weights_at: int, batch_at: int, rows_at: int, cache_at: int, num_blocks: int, out_at: int, /
) -> None: ...
def mla(weights_at: int, batch_at: int, x_at: int, cache_at: int, num_blocks: int, out_at: int, /) -> None: ...
def embed(table_at: int, kind: int, num_ids: int, width: int, ids_at: int, num_rows: int, x_at: int, /) -> None: ...
def lay_out(
    spans_at: int,
    num_spans: int,
    max_blocks: int,
    num_rows: int,
    expands: int,
    cos_at: int,
    sin_at: int,
    num_positions: int,
    half: int,
    batch_at: int,
    /,
) -> None: ...
def reserve_layers(stack_at: int, num_rows: int, /) -> None: ...
def layers(stack_at: int, batch_at: int, ids_at: int, x_at: int, /) -> None: ...
def pack(
    source_at: int,
    row_bytes: int,
    num_out: int,
    num_in: int,
    element_bytes: int,
    interleave: int,
    refuse_nan: int,
    panels_at: int,
    panel_stride: int,
    /,
) -> None: ...
def quantize(
    source_at: int,
    kind: int,
    row_bytes: int,
    num_rows: int,
    num_in: int,
    block: int,
    values_at: int,
    scales_at: int,
    /,
) -> None: ...
def read_file(file: int, offset: int, num_bytes: int, target_at: int, /) -> None: ...
def advise_huge_pages(start_at: int, num_bytes: int, /) -> None: ...
def load(weights_at: int, num_weights: int, /) -> None: ...
def checksum(start_at: int, num_bytes: int, result_at: int, /) -> None: ...
def read_all(start_at: int, num_bytes: int, sum_at: int, /) -> None: ...
def select(isa: str | None, /) -> None: ...
def isa() -> str: ...
def work_aside(on: bool, /) -> None: ...
def set_num_threads(num_threads: int, /) -> None: ...
def num_threads() -> int: ...
def nanoseconds() -> int: ...

"""Bugs to plant in the kernels, one at a time, each with the build that catches it and what it says."""

from dataclasses import dataclass

RACE = "ThreadSanitizer: data race"
OVERFLOW = "heap-buffer-overflow"
BARRIER = "barrier(); "
TOTALS = "for (int i = 0; i < N; ++i) v[i] = scratch[i];"


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # of csrc/cuda
    old: str  # any white space stands for any other
    new: str
    build: str = "plain"  # that catches it
    says: str = "differ"  # a pattern; "differ": wrong values; "refused": by the compiler; "": nothing


MUTATIONS = (
    Mutation("nothing", "reduce.cuh", "", "", says=""),
    Mutation("nothing_asan", "reduce.cuh", "", "", "asan", says=""),
    Mutation("nothing_tsan", "reduce.cuh", "", "", "tsan", says=""),
    # Barriers.
    Mutation("team_sum_reads_early", "reduce.cuh", BARRIER + "#pragma unroll " + TOTALS, TOTALS),
    Mutation(
        "team_sum_writes_early", "reduce.cuh", "barrier();  // of an earlier call, all have read\n", "", "tsan", RACE
    ),
    Mutation("column_sum_steps_early", "reduce.cuh", "width + i]; " + BARRIER, "width + i];"),
    Mutation(
        "column_sum_writes_early",
        "reduce.cuh",
        BARRIER + " // of an earlier call, all have read if (leads)",
        "if (leads)",
        "tsan",
        RACE,
    ),
    Mutation(
        "table_read_early",
        "channels_last.cuh",
        BARRIER + "const Seed seed = seed_of(q.chain);",
        "const Seed seed = seed_of(q.chain);",
    ),
    Mutation("statistics_count_early", "state.cu", "barrier();  // all have read\n", "", "tsan", RACE),
    Mutation("bare_barrier", "reduce.cuh", BARRIER, "__syncthreads();", says="refused"),
    Mutation(
        "barrier_for_some",
        "reduce.cuh",
        BARRIER + "#pragma unroll " + TOTALS,
        "if (lane() == 0) barrier(); " + TOTALS,
        says="divergence|returned|deadlock",
    ),
    Mutation(
        "returns_before_a_barrier",
        "channels_last.cuh",
        "A mean[V], m2[V];",
        "if (!columns.active) return; A mean[V], m2[V];",
        says="returned",
    ),
    # Clusters.
    Mutation(
        "cluster_ends_early",
        "channels_first_resident.cuh",
        "cluster_barrier();  // no block ends while another reads its slot",
        "",
        says="cluster_peer",
    ),
    Mutation(
        "cluster_reads_early",
        "channels_first_resident.cuh",
        "*slot = own; cluster_barrier();",
        "*slot = own;",
        "tsan",
        RACE,
    ),
    Mutation("cluster_reads_itself", "channels_first_resident.cuh", "*cluster_peer(slot, i)", "*slot"),
    # Writers.
    Mutation("two_blocks_write", "team.cuh", "leads() && blockIdx.y == 0", "leads()", "tsan", RACE),
    Mutation("all_threads_write", "channels_first_resident.cuh", "if (threadIdx.x == 0) *slot", "*slot", "tsan", RACE),
    # Sums.
    Mutation("half_a_warp", "reduce.cuh", "int mask = kWarp / 2;", "int mask = kWarp / 4;"),
    Mutation(
        "merge_without_count", "reduce.cuh", "return part.count * (part.mean - pivot);", "return part.mean - pivot;"
    ),
    Mutation("not_zeroed", "team.cuh", "static_cast<A>(chunks.rows)); sum = 0;", "static_cast<A>(chunks.rows));"),
    Mutation(
        "swapped_index",
        "channels_first.cuh",
        "[q.place(team.group(), team.chunk, team.c)] = moments;",
        "[team.c * q.chunks.count + team.chunk] = moments;",
    ),
    # Rows and tails.
    Mutation(
        "statistics_tail", "rows.cuh", "return i < left; }", "return i <= left; }", says="differ|before its start"
    ),
    Mutation("row_tail", "rows.cuh", "return i < left; }", "return i <= left; }", "asan", OVERFLOW),
    Mutation("sample_ends_in_tile", "rows.cuh", "(left < room ? left : room) >= kTile", "left >= kTile"),
    Mutation(
        "chunk_ends_in_tile",
        "rows.cuh",
        "(left < room ? left : room) >= kTile",
        "room >= kTile",
        "asan",
        OVERFLOW,
    ),
    Mutation("next_sample", "rows.cuh", "next.first += samples.gap;", "", says="differ|exit code -(6|11)"),
    Mutation("last_tile", "rows.cuh", "(tiles - warp + warps - 1) / warps", "(tiles - warp) / warps"),
    Mutation("reciprocal", "rows.cuh", "(int64_t{1} << 32) + S - 1) / S", "(int64_t{1} << 32)) / S"),
    Mutation("row_too_far", "channels_last.cuh", "i < there ? load", "i <= there ? load", "asan", OVERFLOW),
    Mutation("group_too_few", "channels_last.cuh", "+ kRows - 1) / kRows;", ") / kRows;"),
    # Rows that do not count, and a strength that only the device knows.
    Mutation("gap_in_moments", "stages_tile.cuh", "&& tile.counts(i)) merge_value", ") merge_value"),
    Mutation("gap_in_columns", "channels_last_staged.cuh", "if (!rows.counts(at + i)) continue;", ""),
    Mutation("gap_in_count", "channel.cuh", "rows(cuda::count(counting, first, last))", "rows(last - first)"),
    Mutation("gap_in_chunk", "channel.cuh", "cuda::count(counting, from, to) : 0", "to - from : 0"),
    Mutation(
        "gap_within_byte", "channel.cuh", "counting.bits[row / 8] & ((1u << row % 8) - 1u)", "counting.bits[row / 8]"
    ),
    Mutation("gap_is_written", "team.cuh", "blank<V>(own, from);", ""),
    Mutation(
        "strength_of_call", "chain.cuh", "q.live ? static_cast<A>(q.live->multiplier) : q.multiplier", "q.multiplier"
    ),
    Mutation("first_row_within_call", "chain.cuh", "lane = (over + i) % math::kRowsPerCall,", "lane = i,"),
    Mutation("next_call_of_first_row", "chain.cuh", "call + (lane < over), c", "call, c"),
    Mutation("call_of_first_row", "chain.cuh", "call += first / math::kRowsPerCall;", ""),
    Mutation("numbers_within_call", "chain.cuh", "value = lane % 2 ? next : value;", ""),
    Mutation("threshold_of_call", "chain.cuh", "q.live ? q.live->threshold : q.threshold", "q.threshold"),
    Mutation("keeps_less_than_all", "chain.cuh", "threshold == kAllKept ? kKeepAll : math::", "math::"),
    # Packs and memory.
    Mutation("misaligned", "backend.cuh", "% (V * sizeof(T)) != 0", "% 4 != 0", says="no multiple of that"),
    Mutation(
        "odd_samples_in_packs",
        "backend.cuh",
        "(shape.channels_last ? shape.C : shape.S) % V == 0",
        "true",
        says="no multiple",
    ),
    Mutation(
        "small_workspace",
        "backend.cuh",
        "context.workspace(sizeof(Pair<A>) *",
        "context.workspace(sizeof(A) *",
        "asan",
        OVERFLOW,
    ),
    Mutation("small_shelf", "channels_first_resident.cuh", "(tensors > 1 ? kWarp : 0)", "0", says="beyond its end"),
    Mutation(
        "shelves_overlap",
        "channels_first_resident.cuh",
        "Tensors * area * V * sizeof(T)",
        "area * V * sizeof(T)",
    ),
    Mutation(
        "mask_too_far",
        "rows.cuh",
        "if (tile.there(first))",
        "if (tile.there(first - 8))",
        "asan",
        OVERFLOW,
    ),
    # Noise.
    Mutation(
        "wrong_lane", "rows.cuh", "shuffle(byte, i / math::kRowsPerCall)", "shuffle(byte, i % math::kRowsPerCall)"
    ),
    Mutation("same_draws", "rows.cuh", "end_call((end + 7) / 8 + lane())", "end_call((end + 7) / 8)"),
    Mutation(
        "shuffle_for_some",
        "rows.cuh",
        "uint32_t bits = 0;",
        "uint32_t bits = 0; if (lane() >= 16) return bits;",
        says="returned|deadlock|divergence",
    ),
    # Groups: their rows, and whose results are whose.
    Mutation("group_begins_between_calls", "channel.cuh", "first / 8 * 8 + i * length", "first + i * length"),
    Mutation(
        "last_group_is_short",
        "channel.cuh",
        "last(first + cut.rows < groups.rows ? first + cut.rows : groups.rows)",
        "last(first + cut.rows)",
        "asan",
        OVERFLOW,
    ),
    Mutation("rows_of_the_group_before", "rows.cuh", "i >= skip && i < left", "i < left"),
    Mutation("no_row_of_the_group_before", "rows.cuh", "return skip == 0 && counting", "return counting"),
    Mutation("columns_of_the_group_before", "channels_last_staged.cuh", "i >= from && i < to", "i < to"),
    Mutation("all_groups_but_one", "channel.cuh", "int64_t group = first; group", "int64_t group = first + 1; group"),
    Mutation(
        "every_group_writes",
        "channels_first.cuh",
        "team.group() != 0 || blockIdx.y != 0",
        "blockIdx.y != 0",
        "tsan",
        RACE,
    ),
    Mutation(
        "small_sums",
        "backend.cuh",
        "q.gathers(2) ? kSums / 2 : 1",
        "1",
        "asan",
        OVERFLOW,
    ),
    Mutation("last_group_counts", "state.cu", "group + i == p.groups - 1 ? last : usual", "usual"),
    # Flat kernels.
    Mutation("next_channel's_rows", "channels_first_flat.cuh", "(row + i < S ? 0 : pitch - S)", "0"),
    Mutation("vectors_of_a_sector", "channels_first_flat.cuh", "% kLanes - before;", "% kLanes + before;"),
    Mutation("tail_of_rows", "stages_tile.cuh", "(i / V) + i % V)", "(i / V))"),
    # The passes apart.
    Mutation(
        "own_count",
        "channel.cuh",
        "q.p.given ? static_cast<A>(*q.p.count) : static_cast<A>(rows)",
        "static_cast<A>(rows)",
    ),
    Mutation("own_sums", "channels_first.cuh", "read_given(q, team.c, sums);", ""),
    Mutation("own_sums_of_columns", "channels_last.cuh", "if (q.p.given) read_given(q, c, both);", ""),
    Mutation("statistics_of_the_noise", "channel.cuh", "if (q.p.var) static_cast<A*>(q.p.var)[at] = var;", ""),
    # Programs.
    Mutation("matched_statistics_are_noisy", "chain.cuh", "is(steps, Stage::drop) && noisy", "is(steps, Stage::drop)"),
    Mutation("no_residual_gradient", "chain.cuh", "if (is(steps, Stage::add)) added(g);", ""),
    Mutation("weight_before_the_norm", "channel.cuh", "k.c * sums[4]", "A(0)"),
    Mutation(
        "act_behind_noise",
        "program_tile.cuh",
        "if (is(q.chain.before, Stage::drop)) multiply(entering, noise.m);",
        "",
    ),
    Mutation("pass_without_keep", "program_tile.cuh", "pass &= keep;", ""),
    Mutation("pass_in_other_rows", "rows.cuh", "vector / kWarp * V", "vector % 2 * V"),
    Mutation("saved_twice", "channels_last_staged.cuh", "pass = Decisions<V>(0u); },", "},"),
    # Noise that is a number.
    Mutation("four_rows_twice", "chain.cuh", "m[i] = m[4 + i];", ""),
    Mutation("channels_differ_by_sample", "rows.cuh", "q.one_channel ? 0 : static_cast", "static_cast"),
    Mutation(
        "first_sample_of_a_call",
        "rows.cuh",
        "(skipped + tile.samples_on(samples, row_in_tile<V>(j))) % kTile",
        "tile.samples_on(samples, row_in_tile<V>(j))",
    ),
    Mutation(
        "another_thread's_multipliers",
        "channels_last_staged.cuh",
        "(row * V + v) * threads + thread;",
        "(row * V + v) * threads;",
        "tsan",
        RACE,
    ),
    Mutation(
        "small_multipliers",
        "channels_last_staged.cuh",
        "int64_t{V} * kRows * threads * sizeof(float)",
        "int64_t{V} * threads * sizeof(float)",
        says="beyond its end|exit code -6",
    ),
    # Launches.
    Mutation("early_and_no_wait", "channels_first.cuh", "previous_grid_ends();", "", says="does not wait"),
    Mutation(
        "no_room_for_clusters",
        "backend.cuh",
        "if (!can_hold(kernel.name, at, kernel.code)) return false;",
        "",
        says="find room",
    ),
)

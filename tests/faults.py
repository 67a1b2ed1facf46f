"""Which tests try which input or fault: number -> [(file, names of its tests)].
`run_all.py --fault N` runs those of a number, and run_all.py checks that no number is left out and
that each test is there. These are the numbers:

1 to 18 files that are no model file or a damaged one; 19 to 32 headers; 33 to 38 numbers that are
not finite; 39 to 49 tokenizers; 50 to 62 prompts and command lines; 63 to 66 memory; 67 to 77
training; 78 to 86 export.py; 87 to 94 files that meet; 95 to 97 data; 98 to 103 checkpoints from
elsewhere; 104 and 105 machines.
"""


def tests(**files):
    """[(file, names)] of test_FILE="names"."""
    return [(f"{file}.py", names) for file, names in files.items()]


FAULTS = {
    # Model files: missing, a folder, empty, shorter than the header, another magic, bytes swapped,
    # another version, git LFS, HTML or JSON, safetensors or GGUF.
    1: tests(test_run="test_not_models"),
    2: tests(test_run="test_not_models"),
    3: tests(test_run="test_kinds_of_files test_damage"),
    4: tests(test_run="test_kinds_of_files test_damage"),
    5: tests(test_run="test_kinds_of_files test_damage", test_export="test_model_bin_faults"),
    6: tests(test_run="test_kinds_of_files test_damage", test_export="test_model_bin_faults"),
    7: tests(test_run="test_kinds_of_files test_damage", test_export="test_model_bin_faults"),
    8: tests(test_run="test_kinds_of_files", test_export="test_safetensors_faults"),
    9: tests(test_run="test_kinds_of_files test_not_models"),
    10: tests(test_run="test_kinds_of_files test_not_models"),
    # Cut by a byte, cut where a tensor begins, bytes behind it, sizes beyond the file, devices and
    # pipes, no permission, more than 2 GiB, cut short while it is read.
    11: tests(test_run="test_kinds_of_files test_damage", test_train="test_damaged_state"),
    12: tests(test_run="test_kinds_of_files test_damage"),
    13: tests(test_run="test_kinds_of_files test_damage"),
    14: tests(test_run="test_kinds_of_files test_damage", test_export="test_header_faults"),
    15: tests(test_run="test_not_models", test_train="test_data_faults"),
    16: tests(test_run="test_permission", test_train="test_permission"),
    17: tests(test_run="test_large_file"),
    18: tests(test_files="test_shrinks"),
    # Headers: sizes of nothing, products and sums that wrap.
    19: tests(test_run="test_header_sizes"),
    20: tests(test_run="test_header_sizes test_damage",
              test_export="test_line_faults test_slot_faults"),
    21: tests(test_run="test_header_sizes", test_export="test_header_faults"),
    # Experts, groups, iterations and gates, dense layers; heads and ranks, RoPE, eps; kinds, flags.
    22: tests(test_run="test_header_experts"),
    23: tests(test_run="test_header_experts"),
    24: tests(test_run="test_header_experts"),
    25: tests(test_run="test_header_experts"),
    26: tests(test_run="test_header_experts"),
    27: tests(test_run="test_header_positions", test_export="test_config_faults"),
    28: tests(test_run="test_header_positions", test_export="test_config_faults"),
    29: tests(test_run="test_header_positions", test_export="test_config_faults"),
    30: tests(test_run="test_header_words"),
    31: tests(test_run="test_header_words"),
    32: tests(test_run="test_damage", test_export="test_header_faults test_safetensors_faults"),
    # Numbers: not finite, ties, underflow, denormal; a loss, a gradient, a norm of 0.
    33: tests(test_run="test_numbers test_environment"),
    34: tests(test_run="test_numbers"),
    35: tests(test_run="test_underflow test_numbers"),
    36: tests(test_run="test_numbers", test_train="test_denormal"),
    37: tests(test_train="test_not_finite test_gradient_not_finite", test_files="test_diverged"),
    38: tests(test_train="test_no_gradient"),
    # Tokenizers.
    39: tests(test_run="test_environment test_chat"),
    40: tests(test_run="test_bpe", test_tokenizer="test_refusals"),
    41: tests(test_run="test_token_lengths test_damaged_tokenizer"),
    42: tests(test_run="test_token_lengths", test_tokenizer="test_merges test_refusals"),
    43: tests(test_tokenizer="test_merges test_refusals"),
    44: tests(test_tokenizer="test_stored"),
    45: tests(test_run="test_header_sizes", test_train="test_usage",
              test_export="test_config_faults"),
    46: tests(test_tokenizer="test_refusals"),
    47: tests(test_tokenizer="test_merges"),
    48: tests(test_tokenizer="test_stored", test_run="test_bpe"),
    49: tests(test_run="test_stream test_text"),
    # Prompts and command lines.
    50: tests(test_run="test_text test_eval"),
    51: tests(test_run="test_eval test_bpe", test_files="test_not_text"),
    52: tests(test_run="test_long_words test_patterns"),
    53: tests(test_run="test_text test_chat"),
    54: tests(test_run="test_text test_usage"),
    55: tests(test_run="test_usage", test_train="test_usage"),
    56: tests(test_run="test_usage"),
    57: tests(test_run="test_usage", test_train="test_usage"),
    58: tests(test_run="test_usage", test_train="test_usage", test_files="test_advice"),
    59: tests(test_run="test_environment test_chat"),
    60: tests(test_run="test_environment", test_train="test_output_faults", test_files="test_help",
              test_failing="test_files"),
    61: tests(test_run="test_not_models", test_train="test_data_faults"),
    62: tests(test_run="test_locale test_usage", test_train="test_locale"),
    # Memory.
    63: tests(test_failing="test_memory"),
    64: tests(test_run="test_memory", test_train="test_memory"),
    65: tests(test_run="test_memory test_environment"),
    66: tests(test_run="test_environment test_long_words", test_train="test_output_faults"),
    # Training: data, disks, kills, signals, --resume, two at once, clocks, threads.
    67: tests(test_train="test_data_faults", test_files="test_not_text"),
    68: tests(test_train="test_output_faults", test_failing="test_files test_next_run"),
    69: tests(test_train="test_permission", test_run="test_permission", test_files="test_links"),
    70: tests(test_train="test_kills", test_files="test_kills"),
    71: tests(test_train="test_output_faults", test_files="test_two_trainers test_kills"),
    72: tests(test_train="test_signals", test_files="test_signals test_validation"),
    73: tests(test_train="test_contradictions"),
    74: tests(test_files="test_two_trainers test_at_once"),
    75: tests(test_failing="test_clock"),
    76: tests(test_run="test_environment", test_train="test_threads"),
    77: tests(test_train="test_threads test_further test_kills"),
    # export.py.
    78: tests(test_export="test_safetensors_faults"),
    79: tests(test_export="test_safetensors_faults"),
    80: tests(test_export="test_tensor_faults"),
    81: tests(test_export="test_newer_names test_blocks"),
    82: tests(test_export="test_newer_names"),
    83: tests(test_export="test_tensor_faults test_config_faults"),
    84: tests(test_export="test_config_faults"),
    85: tests(test_export="test_memory_and_interrupt"),
    86: tests(test_export="test_memory_and_interrupt test_tensor_faults test_command_line"),
    # Files that meet.
    87: tests(test_files="test_clobber", test_export="test_command_line"),
    88: tests(test_files="test_two_trainers test_at_once test_kills"),
    89: tests(test_files="test_links", test_export="test_bin_to_bin test_command_line"),
    90: tests(test_files="test_diverged"),
    91: tests(test_run="test_checksum", test_export="test_header_faults"),
    92: tests(test_files="test_log"),
    93: tests(test_files="test_signals", test_failing="test_files"),
    94: tests(test_export="test_stale"),
    # Data.
    95: tests(test_files="test_not_text"),
    96: tests(test_files="test_nothing_to_predict"),
    97: tests(test_train="test_completions"),
    # Checkpoints from elsewhere.
    98: tests(test_run="test_chat", test_export="test_lines test_config_faults"),
    99: tests(test_tokenizer="test_settings"),
    100: tests(test_tokenizer="test_settings"),
    101: tests(test_export="test_newer_names"),
    102: tests(test_export="test_golden test_tensor_faults"),
    103: tests(test_run="test_patterns", test_tokenizer="test_bombs"),
    # Machines.
    104: tests(test_files="test_busy"),
    105: tests(test_files="test_little_room"),
}

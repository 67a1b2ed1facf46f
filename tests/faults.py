"""Which tests try which input or fault: number -> [(file, names of its tests)].
`run_all.py --fault N` runs those of a number. These are the numbers:

1 to 18 files that are no model file or a damaged one; 19 to 32 headers; 33 to 38 numbers that are
not finite; 39 to 49 tokenizers; 50 to 62 prompts and command lines; 63 to 66 memory; 67 to 77
training; 78 to 86 export.py; 87 to 94 files that meet; 95 to 97 data; 98 to 103 checkpoints from
elsewhere; 104 and 105 machines.
"""
NOT_MODELS = [("test_run.py", "test_not_models")]
DAMAGE = [("test_run.py", "test_damage test_checksum")]
DATA = [("test_train.py", "test_data_faults"), ("test_files.py", "test_not_text")]
SAVING = [("test_train.py", "test_output_faults")]

FAULTS = {
    **{n: NOT_MODELS for n in (1, 2, 8, 9, 10, 15, 16)},
    **{n: DAMAGE for n in (3, 4, 5, 6, 7, 11, 12, 13, 14)},
    17: [("test_size.py", "everything")],
    18: [("test_files.py", "test_shrinks")],
    33: [("test_run.py", "test_numbers")],
    34: [("test_run.py", "test_numbers")],
    35: [("test_run.py", "test_numbers")],
    36: [("test_run.py", "test_numbers")],
    37: [("test_train.py", "test_not_finite"), ("test_files.py", "test_diverged")],
    38: [("test_train.py", "test_no_gradient")],
    60: [("test_train.py", "test_output_faults"), ("test_files.py", "test_help")],
    61: NOT_MODELS,
    62: [("test_run.py", "test_environment")],
    63: [("test_files.py", "test_little_room")],
    64: [("test_run.py", "test_memory")],
    65: [("test_run.py", "test_memory test_environment")],
    66: SAVING,
    67: DATA,
    68: SAVING,
    69: SAVING,
    70: [("test_train.py", "test_kills"), ("test_files.py", "test_kills")],
    71: [("test_train.py", "test_output_faults"),
         ("test_files.py", "test_two_trainers test_kills")],
    72: [("test_train.py", "test_signals"), ("test_files.py", "test_signals test_validation")],
    73: [("test_train.py", "test_contradictions")],
    74: [("test_files.py", "test_two_trainers test_at_once")],
    87: [("test_files.py", "test_clobber"), ("test_export.py", "test_command_line")],
    88: [("test_files.py", "test_two_trainers test_at_once test_kills")],
    89: [("test_files.py", "test_links"), ("test_export.py", "test_bin_to_bin")],
    90: [("test_files.py", "test_diverged")],
    91: [("test_run.py", "test_checksum")],
    92: [("test_files.py", "test_log")],
    93: [("test_files.py", "test_signals")],
    94: [("test_export.py", "test_stale")],
    95: [("test_files.py", "test_not_text")],
    96: [("test_files.py", "test_nothing_to_predict")],
    97: [("test_train.py", "test_completions")],
    98: [("test_run.py", "test_chat"), ("test_export.py", "test_lines test_config_faults")],
    99: [("test_tokenizer.py", "test_settings")],
    100: [("test_tokenizer.py", "test_settings")],
    101: [("test_export.py", "test_newer_names")],
    102: [("test_export.py", "test_golden test_tensor_faults")],
    103: [("test_run.py", "test_patterns"), ("test_tokenizer.py", "test_bombs")],
    105: [("test_files.py", "test_little_room")],
}

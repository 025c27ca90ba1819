"""The method, without DeepSpeed: when, which, where, how many, and what is learned.

    schedule    when: the mode of each step, and the rows it aligns
    selection   which: token importance, and the tokens that are kept
    plan        where: the layers that see all tokens, and those that see the kept ones
    flops       how many: the floating-point operations of a step
    labels      the labelled tokens, and where the last layer has to run for them
    encoder     one layer: plain, compiled or recomputed
    state       what the method knows about one model
    passes      the walk: full and dropped pass through the layers, side by side
    objective   what is learned: Eq. 1-4 of the paper
    convert     `convert`, `revert`, `set_mode`

Each imports only those above it.
"""

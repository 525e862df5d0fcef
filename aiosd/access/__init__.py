"""Access: the rules about what agents may do, and the decisions that are left to a person.

    deed      what an agent is about to do, in the form that rules and people get
    rules     which deeds are denied, need a person's answer, or are allowed (pure)
    patterns  which path, host, group or signal a rule means (pure)
    table     [access] of aiosd.toml

The kernel decides (`aiosd.kernel.approvals`). A service that finds a deed to decide about raises `deed.Unapproved`.
"""

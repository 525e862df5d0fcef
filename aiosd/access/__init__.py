"""What agents may do: rules, and what is asked of a person.

    deed      what an agent is about to do, as rules and people see it
    rules     which deeds are denied, asked for, allowed (pure)
    patterns  which path, host, group or signal a rule means (pure)
    table     [access] of aiosd.toml

The kernel decides (`aiosd.kernel.approvals`). A service that finds out what a call amounts to raises `deed.Unapproved`.
"""

"""What budgets count: the kinds, money, processor time. All pure; the kernel keeps the budgets (`aiosd.kernel.budget`).

limits.py   the kinds of budgets: names, readers, fields of `wire.Limits`
price.py    what tokens of a model cost
cputime.py  the processor time of processes that come and go
"""

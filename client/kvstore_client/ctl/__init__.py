"""The command `kvctl`: what an operator asks of nodes, each question a module.

::

    __main__ ──▶ options        what was typed, checked
        │
        ├──▶ status ─┐
        ├──▶ ping   ─┼─▶ connection ──▶ a control connection to one node
        ├──▶ top    ─┘
        └──▶ doctor ──▶ facts ──▶ findings: pure, a list of checks    (doctor_*)
               │
               └──▶ panels, counter_rows, tables, documents     what is shown: pure

A new command is a module with `add_parser`; `__main__` lists it.
"""

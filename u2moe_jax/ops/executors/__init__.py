"""Ways to carry out a routing plan; each file is one, by its name.

A file NAME.py here makes `executor=NAME` known to the config and to
`grouped_matmul.expert_feed_forward`. It holds a function

  run(x, plan, weights, options, dropout) -> grouped_matmul.Execution

whose arguments are those of `expert_feed_forward`.
"""

"""Eager capture: module hooks, a function mode and a dispatch mode. Installed as msprobe_graph.eager."""

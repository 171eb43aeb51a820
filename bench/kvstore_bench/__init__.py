"""The benchmark `kvbench`: fio-style jobs, replay of traces, simulation of eviction."""

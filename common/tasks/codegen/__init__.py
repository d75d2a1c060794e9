"""CodeGen: tasks to Python code."""

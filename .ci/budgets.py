"""Print what outgrew its room: files over 500 lines, functions over 60, over 8 parameters."""

import ast
import pathlib


def main():
    """One line for the whole package, then one for each thing over its budget."""
    total, over = 0, []
    for path in sorted(pathlib.Path("jaxcert").rglob("*.py")):
        text = path.read_text()
        lines = text.count("\n")
        total += lines
        if lines > 500:
            over.append(f"{path}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                arguments = node.args
                count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
                if length > 60:
                    over.append(f"{path}:{node.lineno} {node.name}: {length} lines")
                if count > 8:
                    over.append(f"{path}:{node.lineno} {node.name}: {count} parameters")
    print(f"jaxcert: {total} lines; over budget: {len(over)}")
    print("\n".join(over))


if __name__ == "__main__":
    main()

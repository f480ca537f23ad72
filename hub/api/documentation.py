"""The page of the OpenAPI document. FastAPI's own pages load their scripts from other hosts; this one has none."""

import html
import json
from collections.abc import Mapping
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c;
  background: #fff }
code, pre { font-family: ui-monospace, monospace; font-size: .9em }
pre { background: #f3f3f3; padding: .8rem; overflow-x: auto; border-radius: 4px }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid #ddd }
h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #eee } pre { background: #262626 }
  th, td, h2 { border-color: #444 } a { color: #8ab4f8 } }
"""
_EXAMPLES = {
    "/v1/embeddings": {
        "input": ["a red kite over a lake", {"image": "data:image/png;base64,..."}],
        "dimensions": 64,
        "task": "retrieval.query",
    },
    "/v1/search": {"text": "a red kite over a lake", "k": 5},
}


def documentation_page(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI document as a page of HTML.

    Args:
        document: as from `FastAPI.openapi`.
    """
    info, schemas = document["info"], document.get("components", {}).get("schemas", {})
    parts = [
        f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1>",
        f"<p>{html.escape(info.get('description', ''))} For programs: <a href='openapi.json'>openapi.json</a>.</p>",
        "<p>If the server has a key, send it with each request: <code>Authorization: Bearer KEY</code>.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('summary', ''))}.</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body is not None:
                parts.append(_example(path))
                parts.append("<h3>Request</h3>" + _fields(body, schemas))
            answer = operation.get("responses", {}).get("200", {}).get("content", {}).get("application/json", {})
            if answer.get("schema"):
                fields = _fields(answer["schema"], schemas)
                parts.append(f"<h3>Answer</h3>{fields}" if fields else "")
            errors = [
                f"<li><code>{status}</code> {html.escape(response['description'])}</li>"
                for status, response in operation.get("responses", {}).items()
                if status.startswith("4") and status != "422"
            ]
            parts.append(f"<h3>Errors</h3><ul>{''.join(errors)}</ul>" if errors else "")
    title = html.escape(info["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>"
    )


def _example(path: str) -> str:
    if path not in _EXAMPLES:
        return ""
    body = json.dumps(_EXAMPLES[path], indent=2)
    return f"<pre>POST {html.escape(path)}\nContent-Type: application/json\n\n{html.escape(body)}</pre>"


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """Return the fields of an object as a table; empty for what is not an object of known fields."""
    schema = _resolved(schema, schemas)
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = f" Default: {json.dumps(field['default'])}." if field.get("default") is not None else ""
        required = " Required." if name in schema.get("required", []) and "input" in name else ""
        described = html.escape(_resolved(field, schemas).get("description", field.get("description", "")))
        rows.append(
            f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_type(field, schemas))}</td>"
            f"<td>{described}{html.escape(default)}{required}</td></tr>"
        )
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table>" if rows else ""


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    return schemas.get(schema["$ref"].rpartition("/")[2], {}) if "$ref" in schema else schema


def _type(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    """Return the type of a field in a few words."""
    if "anyOf" in schema:
        kinds = [_type(one, schemas) for one in schema["anyOf"]]
        return " or ".join(kind for kind in dict.fromkeys(kinds) if kind != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    resolved = _resolved(schema, schemas)
    if resolved.get("type") == "object" or "properties" in resolved:
        return "{" + ", ".join(resolved.get("properties", {})) + "}"
    return str(resolved.get("type", "any"))

"""The page of the report, a jinja2 template."""

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>How good the policy is</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #22303c; background: #fafaf8 }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #e1e6ea }
th { color: #6b7883; font-weight: 600 } td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; display: block; margin: .8rem 0 }
.yes { color: #2f7d4f } .no { color: #d1495b } p.note { color: #6b7883 }
details { margin: .6rem 0 } summary { cursor: pointer }
</style>
<h1>How good the policy is</h1>
{% if "rollout.gif" in images %}
<img src="rollout.gif" alt="A rollout of the trained policy: left view, right view, predicted disparity">
{% endif %}
<table>
<tr><th>measured</th><th>on</th><th>value</th></tr>
{% for row in metrics %}
<tr><td>{{ row.name }}</td><td>{{ row.dataset }}</td><td>{{ row.text }}</td></tr>
{% endfor %}
</table>
{% for policy, count in missing.items() if count %}
<p class="no">{{ policy }}: {{ count }} episodes are not done yet. Failures take longest, so its rate is still too high.
</p>
{% endfor %}
<p class="note">{{ method }}</p>
{% set titles = {"success.png": "Rollouts", "errors.png": "Errors on held-out frames", "losses.png": "Training"} %}
{% for name, title in titles.items() %}
{% if name in images %}
<h2>{{ title }}</h2>
<img src="{{ name }}" alt="{{ title }}">
{% endif %}
{% endfor %}
{% for policy, tasks in by_task.items() %}
<h2>LIBERO's tasks, {{ policy }}</h2>
<table>
<tr><th>task</th><th>instruction</th><th>succeeded</th><th>of</th><th>95 % interval</th></tr>
{% for row in tasks %}
<tr><td class="number">{{ row.task }}</td><td>{{ row.instruction }}</td><td class="number">{{ row.successes }}</td>
<td class="number">{{ row.episodes }}</td>
<td class="number">{{ "%.0f to %.0f %%"|format(100 * row.interval_low, 100 * row.interval_high) }}</td></tr>
{% endfor %}
</table>
{% endfor %}
{% for policy, sizes in by_size.items() %}
<h2>By the target's narrowest side in the picture, {{ policy }}</h2>
<table>
<tr><th>px of the left view, at the start</th><th>succeeded</th><th>of</th><th>95 % interval</th></tr>
{% for row in sizes %}
<tr><td>{{ row.low }} {% if row.high %}to {{ row.high }}{% else %}and more{% endif %}</td>
<td class="number">{{ row.successes }}</td><td class="number">{{ row.episodes }}</td>
<td class="number">{{ "%.0f to %.0f %%"|format(100 * row.interval_low, 100 * row.interval_high) }}</td></tr>
{% endfor %}
</table>
{% endfor %}
{% if episodes %}
<h2>Every seed</h2>
{% endif %}
{% for policy, records in episodes.items() %}
<details>
<summary>{{ policy }}: {{ summaries[policy].successes }} of {{ summaries[policy].episodes }} succeeded
{% if summaries[policy].mean_steps_to_success %}
in {{ "%.1f"|format(summaries[policy].mean_steps_to_success * step_s[policy]) }} s on average
{% endif %}
</summary>
<table>
<tr><th>seed</th><th>instruction</th><th>result</th><th>steps</th><th>progress</th><th>picked instead</th></tr>
{% for record in records %}
<tr><td class="number">{{ record.seed }}</td><td>{{ record.instruction }}</td>
<td class="{{ 'yes' if record.success else 'no' }}">{{ "succeeded" if record.success else "failed" }}</td>
<td class="number">{{ record.steps }}</td><td class="number">{{ "%.2f"|format(record.progress) }}</td>
<td>{{ record.wrong_object or "" }}</td></tr>
{% endfor %}
</table>
</details>
{% endfor %}
</html>
"""
